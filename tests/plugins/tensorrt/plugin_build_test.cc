// The plugins in the hands of a builder: fields, types and formats, shape expressions, workspace, what is refused.
#include <atomic>
#include <random>
#include <thread>

#include "nodes.h"

namespace {

using namespace longspan;
using namespace longspan::testing;

constexpr const char* kEveryInput[] = {"Q",           "K",        "V",        "attn_mask", "nonpad_kv_seqlen",
                                       "global_mask", "global_Q", "global_K", "global_V",  "band_bias",
                                       "sinks",       "spans"};

void TestAnnouncedFields(const Creators& creators) {
  const auto names = [&](const char* op) {
    std::string text;
    const nvinfer1::PluginFieldCollection& fields = *creators.Of(op).getFieldNames();
    for (int32_t i = 0; i < fields.nbFields; ++i) text += std::string(fields.fields[i].name) + " ";
    return text;
  };
  Expect(names(kWindow) ==
             "left_window_size right_window_size is_causal q_num_heads kv_num_heads dilation scale softcap span_ramp "
             "operands results kernel_pack ",
         "the fields of windows: " + names(kWindow));
  Expect(
      names(kBlocks) ==
          "q_block_size kv_block_size is_causal exclude_self q_num_heads kv_num_heads scale softcap operands results "
          "kernel_pack ",
      "the fields of blocks: " + names(kBlocks));
  for (const char* op : {kWindow, kBlocks}) {
    const trt::AttentionCreator& creator = creators.Of(op);
    Expect(std::string(creator.getPluginNamespace()) == "longspan" && std::string(creator.getPluginVersion()) == "1",
           "namespace and version");
  }
}

void TestRefusedFields(const Creators& creators) {
  using Change = std::pair<const char*, std::function<void(Fields*)>>;
  const float number = 1;
  const double wide = 1;
  const Change changes[] = {
      {"unknown field 'windows'; allowed: left_window_size, ", [](Fields* f) { f->Ints("windows", {1}); }},
      {"unknown field 'type'; allowed: ", [](Fields* f) { f->Strings("type", {"float16"}); }},
      {"field left_window_size is 1 of FLOAT32: must be 1 of INT32 or INT64",
       [&](Fields* f) { f->Float("left_window_size", number); }},
      {"field left_window_size is 2 of INT32: must be 1", [](Fields* f) { f->Ints("left_window_size", {1, 2}); }},
      {"field left_window_size is 0 of INT32: must be 1", [](Fields* f) { f->Ints("left_window_size", {}); }},
      {"field left_window_size has -1 values",
       [](Fields* f) { f->Raw("left_window_size", PluginFieldType::kINT32, "", 0, -1); }},
      {"field softcap is 1 of INT32: must be 1 of FLOAT32", [](Fields* f) { f->Ints("softcap", {1}); }},
      {"field softcap is 1 of FLOAT64: must be 1 of FLOAT32",
       [&](Fields* f) { f->Raw("softcap", PluginFieldType::kFLOAT64, &wide, 8, 1); }},
      {"field dilation is 0 of INT32: must be 1 or more", [](Fields* f) { f->Ints("dilation", {}); }},
      {"dilation = [0]: every value must be 1 or more", [](Fields* f) { f->Ints("dilation", {0}); }},
      {"left_window_size = -2: must be -1", [](Fields* f) { f->Ints("left_window_size", {-2}); }},
      {"softcap = -1", [](Fields* f) { f->Float("softcap", -1); }},
      {"q_num_heads = 3 is not a multiple of kv_num_heads = 2",
       [](Fields* f) { f->Ints("q_num_heads", {3}).Ints("kv_num_heads", {2}); }},
      {"field operands is missing", [](Fields* f) { f->Without("operands"); }},
      {"field operands is 1 of INT32: must be CHAR", [](Fields* f) { f->Ints("operands", {0}); }},
      {"field operands lacks V, which is required", [](Fields* f) { f->Strings("operands", {"Q", "K"}); }},
      {"field operands names 'W'; allowed: Q, K, V, attn_mask", [](Fields* f) { f->Strings("operands", {"Q", "W"}); }},
      {"field operands names ''", [](Fields* f) { f->Strings("operands", {"Q", "K", "V", ""}); }},
      {"field operands names K after V", [](Fields* f) { f->Strings("operands", {"Q", "V", "K"}); }},
      {"field operands names V after V", [](Fields* f) { f->Strings("operands", {"Q", "K", "V", "V"}); }},
      {"field results is missing: must be Y, or Y and lse", [](Fields* f) { f->Without("results"); }},
      {"field results is 'lse, Y': must be Y, or Y and lse", [](Fields* f) { f->Strings("results", {"lse", "Y"}); }},
      {"field kernel_pack is 1 of INT32: must be INT8", [](Fields* f) { f->Ints("kernel_pack", {1}); }},
      {"field kernel_pack is 3 bytes long", [](Fields* f) { f->Bytes("kernel_pack", {1, 2, 3}); }},
      {"field kernel_pack differs from what was written (SHA-256)",
       [](Fields* f) {
         std::vector<uint8_t> damaged = f->Data("kernel_pack");
         damaged.back() ^= 1;
         f->Bytes("kernel_pack", damaged);
       }},
  };
  for (const auto& [message, change] : changes) {
    Fields fields = WindowFields();
    change(&fields);
    ExpectRefused(!creators.Build(kWindow, std::move(fields)),
                  "longspan SlidingWindowAttention 'layer': " + std::string(message));
  }
  ExpectRefused(!creators.Deserialize(kWindow, WindowFields().Strings("type", {"int8"})),
                "field type is 'int8': must be float16, bfloat16 or float32");
  ExpectRefused(!creators.Build(kBlocks, BlockFields().Ints("q_block_size", {0})), "q_block_size = 0: must be between");
  ExpectRefused(!creators.Build(kBlocks, BlockFields().Strings("operands", {"Q", "K", "V"})),
                "field operands lacks kv_num_blocks, which is required");
  trt::AttentionCreator& creator = creators.Of(kWindow);
  const auto build = nvinfer1::TensorRTPhase::kBUILD;
  ExpectRefused(!Plugin(creator.createPlugin(nullptr, nullptr, build)), "no fields were given");
  const nvinfer1::PluginField nameless(nullptr, &number, PluginFieldType::kFLOAT32, 1);
  const nvinfer1::PluginField empty("scale", nullptr, PluginFieldType::kFLOAT32, 1);
  const nvinfer1::PluginField twice[] = {{"scale", &number, PluginFieldType::kFLOAT32, 1},
                                         {"scale", &number, PluginFieldType::kFLOAT32, 1}};
  const auto refused = [&](nvinfer1::PluginFieldCollection fields, const char* message) {
    ExpectRefused(!Plugin(creator.createPlugin("layer", &fields, build)), message);
  };
  refused({1, &nameless}, "field number 0 has no name");
  refused({1, &empty}, "field scale has 1 values and no data");
  refused({2, twice}, "field scale is given twice");
  refused({-1, twice}, "no fields were given");
  refused({1, nullptr}, "no fields were given");
}

void TestAcceptedFields(const Creators& creators) {
  const int64_t wide = 7;
  Fields fields = WindowFields().Raw("left_window_size", PluginFieldType::kINT64, &wide, 8, 1);
  const Plugin plugin = creators.Build(kWindow, std::move(fields));
  ExpectFine(static_cast<bool>(plugin), "ints of 64 bits, as programs in Python give them");
  const Plugin same = creators.Build(kWindow, WindowFields());
  Expect(std::string(plugin.build->getTimingCacheID()) == same.build->getTimingCacheID(), "are the same node");
  const std::string text = same.build->getMetadataString();
  Expect(text.rfind("SlidingWindowAttention(Q,K,V,attn_mask) is_causal=0", 0) == 0 &&
             text.find(" left_window_size=7") != std::string::npos &&
             text.find(" dilation=(1, 2)") != std::string::npos && text.find(" kernel_pack=") != std::string::npos,
         "metadata: " + text);
  std::set<std::string> ids = {same.build->getTimingCacheID()};
  ids.insert(creators.Build(kWindow, WindowFields().Ints("left_window_size", {8})).build->getTimingCacheID());
  ids.insert(creators.Build(kWindow, WindowFields().Ints("dilation", {1})).build->getTimingCacheID());
  ids.insert(creators.Build(kWindow, WindowFields().Float("scale", 0.5f)).build->getTimingCacheID());
  ids.insert(creators.Build(kWindow, WindowFields().Strings("results", {"Y"})).build->getTimingCacheID());
  ids.insert(creators.Build(kWindow, WindowFields().Without("kernel_pack")).build->getTimingCacheID());
  Expect(ids.size() == 6, "other nodes have other timing cache ids");
  const Plugin clone = plugin.Clone();
  ExpectFine(clone && clone.build->getMetadataString() == text, "a clone is the same node");
  Expect(clone.core->getPluginName() == std::string(kWindow) && clone.build->getNbOutputs() == 2, "name and outputs");
  Expect(clone.build->getNbTactics() == 0 && clone.runtime->setTactic(0) == 0, "the default tactic");
  ExpectRefused(clone.runtime->setTactic(1) != 0, "tactic 1 was chosen");
  const char *id = clone.build->getTimingCacheID(), *metadata = clone.build->getMetadataString();
  const nvinfer1::PluginFieldCollection* saved = clone.runtime->getFieldsToSerialize();
  Expect(id == clone.build->getTimingCacheID() && metadata == clone.build->getMetadataString() &&
             saved == clone.runtime->getFieldsToSerialize() &&
             saved->fields == clone.runtime->getFieldsToSerialize()->fields,
         "what a plugin has returned stays where it is");
}

// Engines are read by several threads at once, with the creators of one process (the thread sanitizer watches).
void TestThreads(const Creators& creators) {
  std::vector<std::thread> threads;
  std::atomic<int> made{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int trial = 0; trial < 20; ++trial) {
        made += creators.Of(kWindow).getFieldNames()->nbFields == 12;
        made += creators.Deserialize(kWindow, WindowFields().Strings("type", {"float16"})).Clone() ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  ExpectFine(made == 2 * 4 * 20, "plugins made in threads");
}

// Fields of random types, lengths and values: each is refused with a message, or becomes a plugin that an engine keeps
// as it is. Nothing is read beyond what is there (the sanitizers watch).
void TestRandomFields(const Creators& creators) {
  std::mt19937 random(0);
  const auto below = [&random](size_t count) { return random() % count; };
  int accepted = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    const bool window = trial % 2 == 0;
    const char* const name = window ? kWindow : kBlocks;
    Fields fields = window ? WindowFields() : BlockFields();
    const nvinfer1::PluginFieldCollection& announced = *creators.Of(name).getFieldNames();
    for (size_t change = 1 + below(3); change > 0; --change) {
      const nvinfer1::PluginField& field = announced.fields[below(static_cast<size_t>(announced.nbFields))];
      const bool keep_type = below(4) > 0;
      const auto type = keep_type ? field.type : static_cast<PluginFieldType>(below(14));
      const size_t length = below(3) > 0 ? 1 : below(5);
      const size_t size = type == PluginFieldType::kFLOAT64 || type == PluginFieldType::kINT64   ? 8
                          : type == PluginFieldType::kFLOAT32 || type == PluginFieldType::kINT32 ? 4
                                                                                                 : 1;
      std::vector<uint8_t> data(length * size);
      const bool small = below(2) == 0;
      for (size_t i = 0; i < data.size(); ++i) data[i] = small && i % size != 0 ? 0 : static_cast<uint8_t>(random());
      if (below(8) == 0) {
        fields.Without(field.name);
      } else {
        fields.Raw(field.name, type, data.data(), data.size(), static_cast<int32_t>(length));
      }
    }
    const Plugin plugin = creators.Build(name, fields);
    const std::string said = Log::Shared().Take();
    Expect(plugin ? said.empty() : said.rfind("longspan " + std::string(name) + " 'layer': ", 0) == 0,
           "a plugin or a message: " + said);
    if (!plugin) continue;
    ++accepted;
    const Plugin engine = creators.Deserialize(name, Fields::Of(*plugin.Clone().runtime->getFieldsToSerialize()));
    ExpectFine(static_cast<bool>(engine), "an engine with what was accepted");
    if (!engine) continue;
    Expect(engine.build->getTimingCacheID() == std::string(plugin.build->getTimingCacheID()) &&
               engine.build->getMetadataString() == std::string(plugin.build->getMetadataString()),
           std::string("kept as it was: ") + plugin.build->getMetadataString());
  }
  Expect(accepted > 300 && accepted < 2700, std::to_string(accepted) + " of 3000 accepted");
}

// Every type and format at every position, after such as are supported: exactly one type is, T's three at Q.
void TestFormats(const Plugin& plugin, const std::vector<Tensor>& in, const std::vector<Tensor>& out,
                 DataType element) {
  std::vector<Tensor> all = in;
  all.insert(all.end(), out.begin(), out.end());
  const auto inputs = static_cast<int32_t>(in.size()), outputs = static_cast<int32_t>(out.size());
  std::vector<nvinfer1::DynamicPluginTensorDesc> tensors = Profile(all, all);
  for (auto& tensor : tensors) {
    if (tensor.desc.type == all[0].type) tensor.desc.type = element;
  }
  for (size_t position = 0; position < tensors.size(); ++position) {
    const DataType right = tensors[position].desc.type;
    for (int32_t type = 0; type < nvinfer1::EnumMax<DataType>(); ++type) {
      for (int32_t format = 0; format < nvinfer1::EnumMax<nvinfer1::TensorFormat>(); ++format) {
        auto asked = tensors;
        asked[position].desc.type = static_cast<DataType>(type);
        asked[position].desc.format = static_cast<nvinfer1::TensorFormat>(format);
        for (size_t later = position + 1; later < asked.size(); ++later) asked[later].desc.type = DataType::kINT8;
        const auto t = static_cast<DataType>(type);
        const bool is_type =
            position == 0 ? t == DataType::kHALF || t == DataType::kBF16 || t == DataType::kFLOAT : t == right;
        const bool expected = is_type && format == static_cast<int32_t>(nvinfer1::TensorFormat::kLINEAR);
        const bool got =
            plugin.build->supportsFormatCombination(static_cast<int32_t>(position), asked.data(), inputs, outputs);
        Expect(got == expected, "type " + std::to_string(type) + ", format " + std::to_string(format) + " at " +
                                    std::to_string(position));
      }
    }
  }
  Expect(!plugin.build->supportsFormatCombination(0, tensors.data(), inputs - 1, outputs), "another number of inputs");
  Expect(!plugin.build->supportsFormatCombination(inputs + outputs, tensors.data(), inputs, outputs), "no position");
  Expect(!plugin.build->supportsFormatCombination(-1, tensors.data(), inputs, outputs), "no position");
  std::vector<DataType> types, made(out.size());
  for (int32_t i = 0; i < inputs; ++i) types.push_back(tensors[static_cast<size_t>(i)].desc.type);
  ExpectFine(plugin.build->getOutputDataTypes(made.data(), outputs, types.data(), inputs) == 0, "output types");
  for (size_t i = 0; i < out.size(); ++i) Expect(made[i] == tensors[in.size() + i].desc.type, "type of an output");
}

void TestTypes(const Creators& creators) {
  const Plugin window = creators.Build(kWindow, WindowFields()), blocks = creators.Build(kBlocks, BlockFields());
  for (const DataType element : {DataType::kHALF, DataType::kBF16, DataType::kFLOAT}) {
    TestFormats(window, WindowInputs(33), WindowOutputs(33), element);
    TestFormats(blocks, BlockInputs(), BlockOutputs(), element);
  }
  Fields fields = WindowFields().Without("kernel_pack").Strings("results", {"Y"});
  fields.Strings("operands", {std::begin(kEveryInput), std::end(kEveryInput)});
  const Plugin every = creators.Build(kWindow, std::move(fields));
  std::vector<Tensor> in(std::size(kEveryInput), {DataType::kHALF, {1, 1, 1, 1}});
  in[3].type = in[5].type = DataType::kBOOL;
  in[4].type = DataType::kINT64;
  in[11].type = DataType::kFLOAT;
  TestFormats(every, in, {{DataType::kHALF, {1, 1, 1, 1}}}, DataType::kBF16);
  DataType made[2];
  const DataType integers[] = {DataType::kINT32, DataType::kINT32, DataType::kINT32, DataType::kBOOL};
  ExpectRefused(window.build->getOutputDataTypes(made, 2, integers, 4) != 0, "must be FP16, BF16 or FP32");
  const DataType mixed[] = {DataType::kHALF, DataType::kFLOAT, DataType::kHALF, DataType::kBOOL};
  ExpectRefused(window.build->getOutputDataTypes(made, 2, mixed, 4) != 0, "K is of another type");
  ExpectRefused(window.build->getOutputDataTypes(made, 1, mixed, 4) != 0, "4 inputs and 1 outputs; its fields name 4");
}

// The expressions of the outputs' shapes, evaluated at many shapes, against the definition.
void TestShapes(const Creators& creators) {
  const auto shapes = [](const Plugin& plugin, const std::vector<std::vector<std::string>>& in, int32_t outputs,
                         ExpressionBuilder* builder, nvinfer1::DimsExprs* out) {
    std::vector<nvinfer1::DimsExprs> inputs;
    for (const auto& axes : in) inputs.push_back(builder->Shape(axes));
    return plugin.build->getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0, out, outputs,
                                         *builder);
  };
  const auto values = [](const nvinfer1::DimsExprs& shape, const Symbols& symbols) {
    Shape made;
    for (int32_t i = 0; i < shape.nbDims; ++i) {
      made.push_back(static_cast<const Dimension*>(shape.d[i])->Value(symbols));
    }
    return made;
  };
  const Plugin split = creators.Build(kWindow, WindowFields());
  const Plugin merged = creators.Build(kWindow, WindowFields().Ints("q_num_heads", {6}).Ints("kv_num_heads", {2}));
  ExpressionBuilder builder;
  nvinfer1::DimsExprs four[2], three[2];
  ExpectFine(shapes(split, {{"b", "h", "q", "d"}, {"b", "g", "k", "d"}, {"b", "g", "k", "v"}, {"b", "k"}}, 2, &builder,
                    four) == 0,
             "shapes of 4-D operands");
  ExpectFine(shapes(merged, {{"b", "q", "c"}, {"b", "k", "e"}, {"b", "k", "w"}, {"b", "k"}}, 2, &builder, three) == 0,
             "shapes of 3-D operands");
  for (const int64_t batch : {0, 1, 3}) {
    for (const int64_t seq_q : {0, 1, 7, 512}) {
      for (const int64_t size : {8, 16, 80}) {
        const Symbols symbols = {{"b", batch}, {"h", 6},  {"g", 2},        {"q", seq_q},    {"k", 40},
                                 {"d", size},  {"v", 24}, {"c", 6 * size}, {"e", 2 * size}, {"w", 48}};
        const Shapes sizes{true, batch, 6, 2, seq_q, 40, size, 24};
        Shapes flat = sizes;
        flat.split_heads = false;
        Expect(values(four[0], symbols) == sizes.Output() && values(four[1], symbols) == sizes.Lse(), "4-D shapes");
        Expect(values(three[0], symbols) == flat.Output() && values(three[1], symbols) == flat.Lse(), "3-D shapes");
      }
    }
  }
  nvinfer1::DimsExprs fixed[2];
  shapes(merged, {{"b", "q", "96"}, {"b", "k", "32"}, {"b", "k", "48"}, {"b", "k"}}, 2, &builder, fixed);
  Expect(fixed[0].d[2]->isConstant() && fixed[0].d[2]->getConstantValue() == 144, "a width that is known is constant");
  ExpectRefused(
      shapes(merged, {{"b", "q", "c"}, {"b", "k", "e"}, {"b", "k", "47"}, {"b", "k"}}, 2, &builder, fixed) != 0,
      "V has 47 channels, which 2 heads do not divide");
  ExpectRefused(shapes(split, {{"b", "q", "c"}, {"b", "k", "e"}, {"b", "k", "w"}, {"b", "k"}}, 2, &builder, fixed) != 0,
                "3-D inputs need q_num_heads and kv_num_heads");
  ExpectRefused(shapes(split, {{"b", "q", "c"}, {"b", "h", "k", "d"}, {"b", "k", "w"}, {"b"}}, 2, &builder, fixed) != 0,
                "Q, K, V have 3, 4 and 3 axes");
  ExpectRefused(shapes(split, {{"b", "q"}, {"b", "k"}, {"b", "k"}, {"b", "k"}}, 2, &builder, fixed) != 0, "have 2, 2");
  ExpectRefused(shapes(split, {{"b", "h", "q", "d"}}, 2, &builder, fixed) != 0, "the layer has 1 inputs and 2 outputs");
  builder.Fail();
  ExpectRefused(shapes(merged, {{"b", "q", "c"}, {"b", "k", "e"}, {"b", "k", "w"}, {"b"}}, 2, &builder, fixed) != 0,
                "TensorRT made no expression");
}

void TestConfiguration(const Creators& creators) {
  const Plugin plugin = creators.Build(kWindow, WindowFields());
  const auto configure = [&](std::vector<Tensor> low, std::vector<Tensor> high, size_t outputs = 2) {
    const auto in = Profile(low, high), out = Profile(WindowOutputs(33), WindowOutputs(33));
    return plugin.build->configurePlugin(in.data(), static_cast<int32_t>(in.size()), out.data(),
                                         static_cast<int32_t>(outputs));
  };
  ExpectFine(configure(WindowInputs(1), WindowInputs(33, 4)) == 0, "a profile");
  ExpectFine(configure(WindowInputs(33), WindowInputs(33)) == 0, "shapes that are known");
  ExpectRefused(configure(WindowInputs(1), WindowInputs(33), 1) != 0, "the layer has 4 inputs and 1 outputs");
  std::vector<Tensor> wrong = WindowInputs(33);
  wrong[3].shape = {1, 41};
  ExpectRefused(configure(wrong, wrong) != 0, "attn_mask has shape (1, 41): must be (1, 40)");
  wrong = WindowInputs(33);
  wrong[3].type = DataType::kINT32;
  ExpectRefused(configure(wrong, wrong) != 0, "attn_mask is of a type that it may not have here");
  wrong[0].type = DataType::kINT8;
  ExpectRefused(configure(wrong, wrong) != 0, "Q is of a type");
}

void TestWorkspace(const Creators& creators) {
  const auto bytes = [](const Plugin& plugin, const std::vector<Tensor>& low, const std::vector<Tensor>& high,
                        const std::vector<Tensor>& outputs) {
    const auto in = Profile(low, high), out = Profile(outputs, outputs);
    return plugin.build->getWorkspaceSize(in.data(), static_cast<int32_t>(in.size()), out.data(),
                                          static_cast<int32_t>(out.size()));
  };
  const Plugin plugin = creators.Build(kWindow, WindowFields());
  // parts of 3 splits · 4 rows · 4 bytes, and status, a multiple of 256 each; and 256 to align them.
  const size_t got = bytes(plugin, WindowInputs(1), WindowInputs(33), WindowOutputs(33));
  Expect(got == 768, "workspace " + std::to_string(got));
  // For 127 batches there are 3 parts each, for 140 there are 2: a smaller problem than any of the profile needs more.
  const auto parts = WindowPack({{"parts", "90", "cubin"}}, kManyParts);
  const Plugin many = creators.Build(kWindow, WindowFields().Bytes("kernel_pack", parts->data()));
  const size_t most = 127 * 4 * 3 * 256 + 512;
  const size_t bound = bytes(many, WindowInputs(4, 130), WindowInputs(4, 140), WindowOutputs(4, 140));
  Expect(bound >= most && bound <= most + most / 16, "workspace of a smaller problem " + std::to_string(bound));
  ExpectFine(bytes(creators.Build(kBlocks, BlockFields()), BlockInputs(), BlockInputs(1, 9), BlockOutputs()) == 0,
             "a path without buffers needs none");
  const Plugin bare = creators.Build(kWindow, WindowFields().Without("kernel_pack"));
  ExpectFine(bytes(bare, WindowInputs(1), WindowInputs(33), WindowOutputs(33)) == 0, "no pack, no workspace");
  std::vector<Tensor> open = WindowInputs(33);
  open[0].shape[2] = -1;
  const size_t refused = bytes(plugin, open, open, WindowOutputs(33));
  ExpectRefused(refused > size_t{1} << 60, "Q has no upper bound on axis 2");
  open = WindowInputs(33);
  open[0].shape = {1, 2};
  ExpectRefused(bytes(plugin, open, open, WindowOutputs(33)) > size_t{1} << 60,
                "Q, K and V must be all 3-D or all 4-D");
}

}  // namespace

int main() {
  Log::Shared();
  {
    const Creators creators;
    TestAnnouncedFields(creators);
    TestRefusedFields(creators);
    TestAcceptedFields(creators);
    TestRandomFields(creators);
    TestThreads(creators);
    TestTypes(creators);
    TestShapes(creators);
    TestConfiguration(creators);
    TestWorkspace(creators);
  }
  Expect(State().calls.empty() && State().contexts == 0, "a builder that is only asked needs no driver");
  if (failures == 0) std::printf("the plugins tell a builder what it asks\n");
  return failures == 0 ? 0 : 1;
}
