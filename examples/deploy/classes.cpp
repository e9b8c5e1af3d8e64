// The class of each pixel, by ONNX Runtime with this package's kernels, without Python and torch:
//   classes net.onnx kernels.so picture.ppm classes.pgm
#include <onnxruntime_cxx_api.h>

#include <fstream>
#include <iostream>
#include <vector>

int main(int count, char** arguments) {
  if (count != 5) return std::cerr << "usage: classes net.onnx kernels.so picture.ppm classes.pgm\n", 2;
  const float mean[] = {.485f, .456f, .406f}, deviation[] = {.229f, .224f, .225f};  // ImageNet's
  try {
    Ort::Env environment(ORT_LOGGING_LEVEL_WARNING, "classes");
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(2);
    Ort::ThrowOnError(Ort::GetApi().RegisterCustomOpsLibrary_V2(options, arguments[2]));
    Ort::Session session(environment, arguments[1], options);  // once; then call Run for each picture

    std::ifstream file(arguments[3], std::ios::binary);
    std::string kind;
    int64_t width = 0, height = 0, largest = 0;
    file >> kind >> width >> height >> largest;
    if (kind != "P6" || largest != 255) throw std::runtime_error("the picture is no PPM of 8 bits");
    file.get();
    std::vector<unsigned char> pixels(3 * height * width);
    if (!file.read(reinterpret_cast<char*>(pixels.data()), pixels.size())) throw std::runtime_error("it ends early");
    std::vector<float> image(pixels.size());  // (1, 3, height, width)
    for (size_t at = 0; at < pixels.size(); ++at)
      image[at % 3 * height * width + at / 3] = (pixels[at] / 255.f - mean[at % 3]) / deviation[at % 3];

    const int64_t shape[] = {1, 3, height, width};
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto input = Ort::Value::CreateTensor<float>(memory, image.data(), image.size(), shape, 4);
    Ort::AllocatorWithDefaultOptions allocator;
    auto from = session.GetInputNameAllocated(0, allocator), to = session.GetOutputNameAllocated(0, allocator);
    const char *inputs[] = {from.get()}, *outputs[] = {to.get()};
    auto results = session.Run(Ort::RunOptions{}, inputs, &input, 1, outputs, 1);
    auto sizes = results[0].GetTensorTypeAndShapeInfo().GetShape();  // (1, classes, rows, columns)
    const float* scores = results[0].GetTensorData<float>();
    const int64_t area = sizes[2] * sizes[3];
    std::vector<unsigned char> classes(area, 0);
    for (int64_t one = 1; one < sizes[1]; ++one)
      for (int64_t at = 0; at < area; ++at)
        if (scores[one * area + at] > scores[classes[at] * area + at]) classes[at] = static_cast<unsigned char>(one);
    std::ofstream written(arguments[4], std::ios::binary);
    written << "P5\n" << sizes[3] << " " << sizes[2] << "\n255\n";
    written.write(reinterpret_cast<const char*>(classes.data()), area);
    if (!written) throw std::runtime_error("the classes cannot be written");
  } catch (const std::exception& error) {
    return std::cerr << error.what() << "\n", 1;
  }
}
