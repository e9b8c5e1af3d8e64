/* Operations of OpenVINO: convolutions of rows, their kernel maps, and interpolation, for files written with `with_kernels`.
 *
 * kernels/openvino.py compiles it against an installed OpenVINO and links it with the library of kernels. */
#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>

#if defined(WITH_TBB)
#include <tbb/parallel_for.h>
#endif

#include "convolve.h"

namespace {

/* Share work among the threads of OpenVINO, if they are TBB's. */
int share(long count, long grain, share_body body, void *work) {
#if defined(WITH_TBB)
    const long parts = (count + grain - 1) / grain;
    if (parts > 1 && tbb::this_task_arena::max_concurrency() > 1) {
        tbb::parallel_for(0l, parts, [=](long part) {
            const long begin = part * grain, end = begin + grain;
            body(begin, end < count ? end : count, work);
        });
        return 1;
    }
#endif
    return 0;
}

tensor as_tensor(const ov::Tensor &from) {
    const ov::Shape shape = from.get_shape();
    OPENVINO_ASSERT(shape.size() <= MOST_DIMENSIONS, "cadsurgery: a tensor has too many dimensions");
    tensor to{from.data(), shape.size(), {}};
    for (size_t i = 0; i < shape.size(); i++) to.size[i] = static_cast<int64_t>(shape[i]);
    return to;
}

void check(const char *reason) { OPENVINO_ASSERT(!reason, reason); }

/* A convolution whose weights are packed in the first call. */
class Packed {
public:
    ~Packed() {
        if (made_) cadsurgery_free_convolution(made_);
    }
    convolution *get(const numbers &of, const tensor *in) {
        const std::lock_guard<std::mutex> guard(lock_);
        if (!made_) check(cadsurgery_make_convolution(&of, in, &made_));
        return made_;
    }

private:
    std::mutex lock_;
    convolution *made_ = nullptr;
};

/* What all operations share. `Name::type` is the operation's name, `Name::in_8_bits` says if rows and result are bytes. */
template <class Name, size_t number_of_inputs>
class Operation : public ov::op::Op {
public:
    static const ov::DiscreteTypeInfo &get_type_info_static() {
        static const ov::DiscreteTypeInfo info{Name::type, "cadsurgery"};
        return info;
    }
    const ov::DiscreteTypeInfo &get_type_info() const override { return get_type_info_static(); }
    bool has_evaluate() const override { return true; }

protected:
    using Op::Op;

    void check_inputs(ov::element::Type (*type_of)(size_t place)) const {
        OPENVINO_ASSERT(get_input_size() == number_of_inputs, "cadsurgery: ", Name::type, " takes another number of inputs");
        for (size_t i = 0; i < number_of_inputs; i++)
            OPENVINO_ASSERT(get_input_element_type(i).compatible(type_of(i)), "cadsurgery: input ", i, " of ", Name::type,
                            " is of type ", get_input_element_type(i), "; it has to be ", type_of(i));
    }

    ov::Dimension side(size_t input, size_t axis) const {
        const ov::PartialShape shape = get_input_partial_shape(input);
        return shape.rank().is_static() ? shape[axis] : ov::Dimension::dynamic();
    }

    /* With one thread OpenVINO (2026.4) goes on after an exception: what it returns must not look like a result. */
    static bool finish(ov::Tensor &out, const char *reason) {
        if (reason && out.get_element_type() == ov::element::f32)
            std::fill_n(out.data<float>(), out.get_size(), std::numeric_limits<float>::quiet_NaN());
        check(reason);
        return true;
    }

    static std::vector<tensor> as_tensors(const ov::TensorVector &inputs) {
        std::vector<tensor> in;
        for (size_t i = 0; i < number_of_inputs; i++) in.push_back(as_tensor(inputs[i]));
        return in;
    }
};

/* An operation that reads rows by a table, and has one result. */
template <class Name, size_t number_of_inputs>
class OfRows : public Operation<Name, number_of_inputs> {
protected:
    using Operation<Name, number_of_inputs>::Operation;

    /* Check the inputs, and set the result: as many rows as the table has, as wide as an axis of an input. */
    void infer(size_t input, size_t axis) {
        this->check_inputs(type_of);
        this->set_output_type(0, own_type(), {this->side(TABLE, 0), this->side(input, axis)});
    }

private:
    static ov::element::Type own_type() { return Name::in_8_bits ? ov::element::u8 : ov::element::f32; }
    static ov::element::Type type_of(size_t place) {
        if (place == TABLE || place == SOURCES) return ov::element::i32;
        if (place == WEIGHT && Name::in_8_bits) return ov::element::i8;
        return place == ROWS_IN || place == RESIDUAL ? own_type() : ov::element::f32;
    }
};

template <class Name>
class Convolution : public OfRows<Name, Name::in_8_bits ? INPUTS_IN_8_BITS : INPUTS> {
    using Base = OfRows<Name, Name::in_8_bits ? INPUTS_IN_8_BITS : INPUTS>;

public:
    Convolution() = default;
    Convolution(const ov::OutputVector &inputs, const numbers &of) : Base(inputs), of_(of) {
        this->constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override { this->infer(BIAS, 0); }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector &inputs) const override {
        return std::make_shared<Convolution>(inputs, of_);
    }

    bool visit_attributes(ov::AttributeVisitor &visitor) override {
        visitor.on_attribute("outside", of_.outside);
        visitor.on_attribute("low", of_.low);
        visitor.on_attribute("high", of_.high);
        if (Name::in_8_bits) {
            visitor.on_attribute("scale", of_.scale);
            visitor.on_attribute("zero", of_.zero);
            visitor.on_attribute("scale_of_result", of_.scale_of_result);
            visitor.on_attribute("zero_of_result", of_.zero_of_result);
            visitor.on_attribute("scale_of_residual", of_.scale_of_residual);
            visitor.on_attribute("zero_of_residual", of_.zero_of_residual);
        }
        return true;
    }

    bool evaluate(ov::TensorVector &outputs, const ov::TensorVector &inputs) const override {
        const std::vector<tensor> in = Base::as_tensors(inputs);
        convolution *const by = packed_->get(of_, in.data());
        int64_t size[2];
        check(cadsurgery_size_of_result(by, in.data(), size));
        outputs[0].set_shape({static_cast<size_t>(size[0]), static_cast<size_t>(size[1])});
        return Base::finish(outputs[0], cadsurgery_convolve(by, in.data(), outputs[0].data(), share));
    }

private:
    numbers of_{};
    std::shared_ptr<Packed> packed_ = std::make_shared<Packed>();
};

/* Rows by a table. */
template <class Name>
class Pick : public OfRows<Name, INPUTS_OF_PICK> {
    using Base = OfRows<Name, INPUTS_OF_PICK>;

public:
    Pick() = default;
    explicit Pick(const ov::OutputVector &inputs) : Base(inputs) { this->constructor_validate_and_infer_types(); }

    void validate_and_infer_types() override { this->infer(ROWS_IN, 1); }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector &inputs) const override {
        return std::make_shared<Pick>(inputs);
    }

    bool visit_attributes(ov::AttributeVisitor &) override { return true; }

    bool evaluate(ov::TensorVector &outputs, const ov::TensorVector &inputs) const override {
        const std::vector<tensor> in = Base::as_tensors(inputs);
        int64_t size[2];
        check(cadsurgery_size_of_pick(in.data(), size));
        outputs[0].set_shape({static_cast<size_t>(size[0]), static_cast<size_t>(size[1])});
        return Base::finish(outputs[0], cadsurgery_pick(Name::in_8_bits, in.data(), outputs[0].data(), share));
    }
};

/* Cells, or a kernel map: several results, whose sizes are not known before they are found. */
template <class Name>
class Find : public Operation<Name, Name::inputs> {
    using Base = Operation<Name, Name::inputs>;

public:
    Find() = default;
    explicit Find(const ov::OutputVector &inputs) : Base(inputs) { this->constructor_validate_and_infer_types(); }

    void validate_and_infer_types() override {
        this->check_inputs([](size_t) -> ov::element::Type { return ov::element::i32; });
        const ov::Dimension any = ov::Dimension::dynamic();
        if (Name::inputs == INPUTS_OF_CELLS) {
            this->set_output_type(0, ov::element::i32, {any});
            this->set_output_type(1, ov::element::i32, {any});
            return;
        }
        this->set_output_type(0, ov::element::i32, {this->side(TARGETS, 0), this->side(DOWN, 0) * this->side(ACROSS, 0)});
        if (!Name::has_halo) return;
        this->set_output_type(1, ov::element::i32, {any, 4});
        this->set_output_type(2, ov::element::f32, {any, 4});
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector &inputs) const override {
        return std::make_shared<Find>(inputs);
    }

    bool visit_attributes(ov::AttributeVisitor &) override { return true; }

    bool evaluate(ov::TensorVector &outputs, const ov::TensorVector &inputs) const override {
        const auto make = [](void *call, size_t place, const int64_t *size, size_t rank) -> void * {
            ov::Tensor &result = (*static_cast<ov::TensorVector *>(call))[place];
            result.set_shape(ov::Shape(size, size + rank));
            return result.data();
        };
        check(Name::find_results(Base::as_tensors(inputs).data(), make, &outputs, share));
        return true;
    }
};

/* What is computed of maps: `dimensions` sizes are those of the result. */
template <class Name>
class OfMaps : public Operation<Name, Name::inputs> {
    using Base = Operation<Name, Name::inputs>;

public:
    OfMaps() = default;
    explicit OfMaps(const ov::OutputVector &inputs) : Base(inputs) { this->constructor_validate_and_infer_types(); }

    void validate_and_infer_types() override {
        this->check_inputs([](size_t place) -> ov::element::Type { return place == MAPS ? ov::element::f32 : ov::element::i32; });
        ov::PartialShape sizes = ov::PartialShape::dynamic(Name::dimensions);
        if (Name::inputs == INPUTS_OF_PIXELS) {
            sizes[0] = this->side(LEVELS_OF, 0), sizes[3] = this->side(MAPS, 1);
            this->set_output_type(0, ov::element::f32, sizes);
            return;
        }
        if (const auto known = ov::as_type_ptr<ov::op::v0::Constant>(this->get_input_node_shared_ptr(SIZES)))
            sizes = known->template cast_vector<int64_t>();
        OPENVINO_ASSERT(sizes.size() == Name::dimensions, "cadsurgery: ", Name::type, " takes another number of sizes");
        for (size_t i = 0; i < 2 && Name::dimensions == 4; i++) sizes[i] = this->side(MAPS, i); /* batch and channels stay */
        this->set_output_type(0, ov::element::f32, sizes);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector &inputs) const override {
        return std::make_shared<OfMaps>(inputs);
    }

    bool visit_attributes(ov::AttributeVisitor &) override { return true; }

    bool evaluate(ov::TensorVector &outputs, const ov::TensorVector &inputs) const override {
        const std::vector<tensor> in = Base::as_tensors(inputs);
        int64_t size[Name::dimensions];
        check(Name::size(in.data(), size));
        outputs[0].set_shape(ov::Shape(size, size + Name::dimensions));
        return Base::finish(outputs[0], Name::compute(in.data(), outputs[0].data()));
    }
};

#define BY_ROWS(name, bytes)                         \
    struct name##Name {                              \
        static constexpr const char *type = #name;   \
        static constexpr bool in_8_bits = bytes;     \
    };
#define BY_MAPS(name, many, number, size_function, function)                                                         \
    struct name##Name {                                                                                          \
        static constexpr const char *type = #name;                                                               \
        static constexpr size_t inputs = many;                                                                   \
        static constexpr size_t dimensions = number;                                                             \
        static const char *size(const tensor *in, int64_t *to) { return size_function(in, to); }                 \
        static const char *compute(const tensor *in, void *out) { return function(in, out, share); }             \
    };
#define BY_FINDING(name, number, results, function)                                                \
    struct name##Name {                                                                            \
        static constexpr const char *type = #name;                                                 \
        static constexpr size_t inputs = number;                                                   \
        static constexpr bool has_halo = results == 3;                                             \
        static constexpr find *find_results = function;                                            \
    };
OPERATIONS(BY_ROWS, BY_ROWS, BY_MAPS, BY_FINDING)

ov::OutputVector inputs_of(const ov::frontend::NodeContext &node) {
    ov::OutputVector inputs;
    for (size_t i = 0; i < node.get_input_size(); i++) inputs.push_back(node.get_input(static_cast<int>(i)));
    return inputs;
}

/* Add an operation without attributes. */
template <class Made, class Name>
void add_plain(std::vector<ov::Extension::Ptr> &to) {
    to.push_back(std::make_shared<ov::OpExtension<Made>>());
    const auto read = [](const ov::frontend::NodeContext &node) { return std::make_shared<Made>(inputs_of(node))->outputs(); };
    to.push_back(std::make_shared<ov::frontend::onnx::ConversionExtension>(Name::type, "cadsurgery", read));
}

/* Add a convolution: for ONNX files, and for files of OpenVINO's own format. */
template <class Name>
void add(std::vector<ov::Extension::Ptr> &to) {
    using Made = Convolution<Name>;
    to.push_back(std::make_shared<ov::OpExtension<Made>>());
    const auto read = [](const ov::frontend::NodeContext &node) -> ov::OutputVector {
        const auto number = [&](const char *name) { return node.get_attribute<float>(name); };
        numbers of{number("outside"), number("low"), number("high"), 0, 0, 0, 0, 0, 0};
        if (Name::in_8_bits) {
            of.scale = number("scale"), of.zero = number("zero");
            of.scale_of_result = number("scale_of_result"), of.zero_of_result = number("zero_of_result");
            of.scale_of_residual = number("scale_of_residual"), of.zero_of_residual = number("zero_of_residual");
        }
        return {std::make_shared<Made>(inputs_of(node), of)};
    };
    to.push_back(std::make_shared<ov::frontend::onnx::ConversionExtension>(Name::type, "cadsurgery", read));
}

std::vector<ov::Extension::Ptr> extensions() {
    std::vector<ov::Extension::Ptr> all;
#define ADD(name, ...) add<name##Name>(all);
#define ADD_PICK(name, ...) add_plain<Pick<name##Name>, name##Name>(all);
#define ADD_OF_MAPS(name, ...) add_plain<OfMaps<name##Name>, name##Name>(all);
#define ADD_FIND(name, ...) add_plain<Find<name##Name>, name##Name>(all);
    OPERATIONS(ADD, ADD_PICK, ADD_OF_MAPS, ADD_FIND)
    return all;
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(extensions());
