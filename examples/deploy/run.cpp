// Runs a network without Python: run compiled.pt2 image.npy output
//
// compiled.pt2  what compile.py wrote, on this kind of machine
// image.npy     (B, C, H, W) float32, normalised as for the network, of the shape that the file is for
// output        each output of the network is written as output_NAME.npy

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <fstream>
#include <iostream>
#include <sstream>

// A .npy file is a magic word, the length of its header, the header (a Python dictionary as text), and the values.
static const std::string kMagic("\x93NUMPY\x01\x00", 8);

at::Tensor read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic(8, ' ');
  unsigned char length[2] = {0, 0};
  file.read(magic.data(), 8).read(reinterpret_cast<char*>(length), 2);
  TORCH_CHECK(file && magic == kMagic, path, " is no .npy file of version 1");
  std::string header(length[0] + 256 * length[1], ' ');
  file.read(header.data(), static_cast<std::streamsize>(header.size()));
  TORCH_CHECK(
      header.find("'<f4'") != std::string::npos && header.find("'fortran_order': False") != std::string::npos,
      path, " does not hold float32 in C order");
  auto first = header.find('(') + 1;
  std::istringstream numbers(header.substr(first, header.find(')') - first));
  std::vector<int64_t> shape;
  for (std::string number; std::getline(numbers, number, ',');) {
    if (number.find_first_of("0123456789") != std::string::npos) shape.push_back(std::stoll(number));
  }
  at::Tensor values = at::empty(shape, at::kFloat);
  file.read(reinterpret_cast<char*>(values.data_ptr<float>()), static_cast<std::streamsize>(values.nbytes()));
  TORCH_CHECK(file, path, " ends early");
  return values;
}

void write_npy(const std::string& path, const at::Tensor& tensor) {
  at::Tensor values = tensor.to(at::kCPU, at::kFloat).contiguous();
  std::ostringstream header;
  header << "{'descr': '<f4', 'fortran_order': False, 'shape': (";
  for (int64_t size : values.sizes()) header << size << ", ";
  header << "), }";
  std::string text = header.str();
  text.append(63 - (kMagic.size() + 2 + text.size()) % 64, ' ').push_back('\n');
  std::ofstream file(path, std::ios::binary);
  file << kMagic << static_cast<char>(text.size() % 256) << static_cast<char>(text.size() / 256) << text;
  file.write(reinterpret_cast<const char*>(values.data_ptr<float>()), static_cast<std::streamsize>(values.nbytes()));
  TORCH_CHECK(file, path, " cannot be written");
}

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: run compiled.pt2 image.npy output\n";
    return 2;
  }
  try {
    c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader network(arguments[1]);
    auto about = network.get_metadata();
    at::Tensor image = read_npy(arguments[2]);
    std::string shape;
    for (int64_t size : image.sizes()) shape += (shape.empty() ? "" : "x") + std::to_string(size);
    // The compiled code does not look.
    TORCH_CHECK(shape == about.at("image"), "the network takes ", about.at("image"), ", not ", shape);

    std::istringstream names(about.at("outputs"));
    for (const at::Tensor& output : network.run({image})) {
      std::string name;
      std::getline(names, name, ',');
      std::string path = std::string(arguments[3]) + "_" + name + ".npy";
      write_npy(path, output);
      std::cout << path << " " << output.sizes() << "\n";
    }
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
