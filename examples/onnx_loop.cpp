// Sample in C++: sampler.onnx is the whole sampling loop, one call of ONNX Runtime.
//
//     python examples/onnx_loop.py inputs/          # writes the inputs, prints GRAPH
//     H=ort/include L=ort/lib                       # of ONNX Runtime's release, unpacked
//     g++ -std=c++17 -I$H examples/onnx_loop.cpp -L$L -Wl,-rpath,$L -lonnxruntime -o onnx_loop
//     ./onnx_loop GRAPH inputs/                     # compares with inputs/sample.bin
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

template <typename T>
std::vector<T> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<T> values(bytes.size() / sizeof(T));
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(values.data()));
  return values;
}

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: onnx_loop GRAPH FOLDER\n"), 2;
  const std::string folder = std::string(argv[2]) + "/";
  auto x = read<float>(folder + "x.bin");
  auto noise = read<float>(folder + "noise.bin");
  auto call = read<float>(folder + "call.bin");      // the program: 6 numbers a network call,
  auto update = read<float>(folder + "update.bin");  // and a matrix of 4 by 6
  auto label = read<std::int64_t>(folder + "label.bin");
  const std::int64_t rows = call.size() / 6, batch = 1;

  Ort::Env env;
  Ort::Session session(env, argv[1], Ort::SessionOptions{});
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto tensor = [&](auto& values, std::vector<std::int64_t> shape) {
    return Ort::Value::CreateTensor(memory, values.data(), values.size(), shape.data(),
                                    shape.size());
  };
  std::vector<Ort::Value> inputs;
  inputs.push_back(tensor(x, {batch, 3, 32, 32}));
  inputs.push_back(tensor(noise, {rows, batch, 3, 32, 32}));
  inputs.push_back(tensor(call, {rows, batch, 6}));
  inputs.push_back(tensor(update, {rows, batch, 4, 6}));
  inputs.push_back(tensor(label, {batch}));
  const char* names[] = {"x", "noise", "call", "update", "label"};
  const char* outputs[] = {"sample"};
  auto found = session.Run(Ort::RunOptions{}, names, inputs.data(), 5, outputs, 1);

  const float* sample = found[0].GetTensorData<float>();
  const auto expected = read<float>(folder + "sample.bin");
  float largest = 0;
  for (std::size_t i = 0; i < expected.size(); ++i)
    largest = std::max(largest, std::abs(sample[i] - expected[i]));
  std::printf("%zu values, largest difference from Python %g\n", expected.size(), largest);
}
