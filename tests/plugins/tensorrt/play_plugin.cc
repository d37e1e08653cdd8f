// Builds, saves, reads and runs the plugin of one node on the stub driver and prints what the driver was asked, so that
// it can be compared with what the launcher alone asks (tests/plugins/cuda/launch_pack.cc). Reads lines "KEYWORD FIELD
// …" from the standard input:
//
//   device CAPABILITY MULTIPROCESSORS SHARED_MEMORY
//   pack FILE
//   node OPERATOR DTYPE HAS_LSE
//   int NAME VALUE | float NAME VALUE | dilation VALUE …
//   input NAME SIZE …           in the definition's order and layout
//   launch                      prints "memset …" and "launch …" lines, or "error …"; then "workspace BYTES" for this
//                               and all smaller shapes; then "done"
//
// Input number i of the definition is at address 4096 · (i + 1), Y at 2^20, lse at 2^21, the workspace at 2^30, the
// stream is 7.
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

#include "cuda/operators.h"
#include "nodes.h"

namespace {

using namespace longspan;
using namespace longspan::testing;

struct Request {
  std::string op, dtype;
  bool lse = false;
  Fields fields;
  std::vector<std::pair<std::string, Shape>> inputs;
};

DataType TypeOf(const Request& request, const std::string& input) {
  const DataType element = request.dtype == "float16"    ? DataType::kHALF
                           : request.dtype == "bfloat16" ? DataType::kBF16
                                                         : DataType::kFLOAT;
  for (const cuda::InputFact& fact : cuda::FindOperator(request.op)->inputs) {
    if (fact.name != input) continue;
    if (fact.type == "*u8") return input == "block_masks" ? DataType::kINT32 : DataType::kBOOL;
    if (fact.type == "*i64") return DataType::kINT64;
    if (fact.type == "*i32") return DataType::kINT32;
    return fact.type.empty() ? element : DataType::kFLOAT;
  }
  return element;
}

// Every operand, with block_masks as the words that a network holds.
std::vector<Tensor> InputsOf(const Request& request) {
  std::vector<Tensor> tensors;
  for (const auto& [name, shape] : request.inputs) {
    const Shape words = name == "block_masks" ? Shape{shape[0], shape[1] * shape[2] / 4} : shape;
    tensors.push_back({TypeOf(request, name), words});
  }
  return tensors;
}

// The outputs' shapes, from the plugin's own expressions.
std::vector<Tensor> OutputsOf(const Request& request, const Plugin& plugin, const std::vector<Tensor>& in) {
  ExpressionBuilder builder;
  std::vector<nvinfer1::DimsExprs> inputs;
  std::vector<DataType> types;
  for (const Tensor& tensor : in) {
    std::vector<std::string> axes;
    for (const int64_t size : tensor.shape) axes.push_back(std::to_string(size));
    inputs.push_back(builder.Shape(axes));
    types.push_back(tensor.type);
  }
  const int32_t count = request.lse ? 2 : 1, given = static_cast<int32_t>(in.size());
  nvinfer1::DimsExprs shapes[2];
  DataType made[2];
  if (plugin.build->getOutputShapes(inputs.data(), given, nullptr, 0, shapes, count, builder) != 0 ||
      plugin.build->getOutputDataTypes(made, count, types.data(), given) != 0) {
    return {};
  }
  std::vector<Tensor> out;
  for (int32_t i = 0; i < count; ++i) {
    Shape shape;
    for (int32_t axis = 0; axis < shapes[i].nbDims; ++axis) shape.push_back(shapes[i].d[axis]->getConstantValue());
    out.push_back({made[i], shape});
  }
  return out;
}

void Play(Request& request, const Creators& creators) {
  std::vector<std::string> names;
  for (const auto& [name, shape] : request.inputs) names.push_back(name);
  request.fields.Strings("operands", names);
  request.fields.Strings("results", request.lse ? std::vector<std::string>{"Y", "lse"} : std::vector<std::string>{"Y"});
  const Plugin network = creators.Build(request.op, request.fields);
  if (!network) return;
  const std::vector<Tensor> in = InputsOf(request), out = OutputsOf(request, network, in);
  if (out.empty()) return;
  std::vector<Tensor> low = in;
  for (size_t i = 0; i < low.size(); ++i) {
    for (size_t axis = 0; axis < low[i].shape.size(); ++axis) {
      // The axes that vary in networks: batch and length; of others heads, windows and head sizes.
      const bool length = low[i].shape.size() == 4 ? axis == 2 && i < 3 : axis == 1;
      if (axis == 0 || length) low[i].shape[axis] = std::min<int64_t>(low[i].shape[axis], 1);
    }
  }
  const auto profile = Profile(low, in), results = Profile(out, out);
  const int32_t given = static_cast<int32_t>(in.size()), made = static_cast<int32_t>(out.size());
  const Plugin builder = network.Clone();
  if (builder.build->configurePlugin(profile.data(), given, results.data(), made) != 0) return;
  std::cout << "workspace " << builder.build->getWorkspaceSize(profile.data(), given, results.data(), made) << "\n";
  const nvinfer1::PluginFieldCollection* saved = builder.runtime->getFieldsToSerialize();
  if (saved == nullptr) return;
  const Plugin engine = creators.Deserialize(request.op, Fields::Of(*saved));
  Context context;
  if (!engine) return;
  const Plugin plugin = engine.Attach(&context);
  if (!plugin || plugin.Announce(in, out) != 0) return;
  std::vector<const void*> inputs;
  const std::vector<cuda::InputFact>& facts = cuda::FindOperator(request.op)->inputs;
  for (const std::string& name : names) {
    const auto at = std::find_if(facts.begin(), facts.end(), [&](const auto& fact) { return fact.name == name; });
    inputs.push_back(reinterpret_cast<const void*>(4096 * (static_cast<size_t>(at - facts.begin()) + 1)));
  }
  void* const outputs[] = {reinterpret_cast<void*>(size_t{1} << 20), reinterpret_cast<void*>(size_t{1} << 21)};
  const auto ins = Describe(in), outs = Describe(out);
  plugin.runtime->enqueue(ins.data(), outs.data(), inputs.data(), outputs, reinterpret_cast<void*>(size_t{1} << 30),
                          reinterpret_cast<cudaStream_t>(size_t{7}));
}

}  // namespace

int main() {
  const Creators creators;
  Request request;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string keyword, name;
    words >> keyword;
    if (keyword == "device") {
      words >> State().capability >> State().multiprocessors >> State().shared_memory;
    } else if (keyword == "pack") {
      words >> name;
      std::ifstream file(name, std::ios::binary);
      request.fields.Bytes("kernel_pack", {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
    } else if (keyword == "node") {
      request = {};
      words >> request.op >> request.dtype >> request.lse;
    } else if (keyword == "int") {
      int32_t value = 0;
      words >> name >> value;
      request.fields.Ints(name, {value});
    } else if (keyword == "float") {
      float value = 0;
      words >> name >> value;
      request.fields.Float(name, value);
    } else if (keyword == "dilation") {
      std::vector<int32_t> steps;
      for (int32_t step = 0; words >> step;) steps.push_back(step);
      request.fields.Ints("dilation", steps);
    } else if (keyword == "input") {
      words >> name;
      Shape shape;
      for (int64_t size = 0; words >> size;) shape.push_back(size);
      request.inputs.emplace_back(name, shape);
    } else if (keyword == "launch") {
      Log::Shared().Take();
      Play(request, creators);
      std::istringstream said(Log::Shared().Take());
      for (std::string error; std::getline(said, error);) std::cout << "error " << error << "\n";
    }
    if (keyword == "launch" || keyword == "pack") {
      for (const std::string& call : TakeCalls()) std::cout << call << "\n";
      std::cout << "done" << std::endl;
    }
  }
  return 0;
}
