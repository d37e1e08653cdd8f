// Plays TensorRT's builder for quickly deployable plugins, without TensorRT: NVIDIA's Python bindings load against this
// library instead of libnvinfer, and `quick_build` asks a registered plugin for all that an engine would hold of it.
//
// Expressions over dimensions are kept as text, in the syntax of plugins/gpu/expressions.py: d0_2 is axis 2 of input 0,
// and less(a, b), equal(a, b) are 1 or 0. The interfaces of these plugins are in no public header, so what is needed of
// them is declared here: names and order of virtual functions as the bindings of TensorRT 11 call them.
#include <NvInfer.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace nv = nvinfer1;

namespace {

class QuickBuild : public nv::IPluginCapability {
 public:
  virtual int32_t getOutputDataTypes(nv::DataType* types, int32_t outputs, nv::DataType const* input_types,
                                     int32_t const* ranks, int32_t inputs) const noexcept = 0;
  virtual int32_t getOutputShapes(nv::DimsExprs const* inputs, int32_t count, nv::DimsExprs const* shape_inputs,
                                  int32_t shape_count, nv::DimsExprs* outputs, int32_t output_count,
                                  nv::IExprBuilder& builder) noexcept = 0;
  virtual int32_t configurePlugin(nv::DynamicPluginTensorDesc const* in, int32_t inputs,
                                  nv::DynamicPluginTensorDesc const* out, int32_t outputs) noexcept = 0;
  virtual int32_t getNbSupportedFormatCombinations(nv::DynamicPluginTensorDesc const* both, int32_t inputs,
                                                   int32_t outputs) noexcept = 0;
  virtual int32_t getSupportedFormatCombinations(nv::DynamicPluginTensorDesc const* both, int32_t inputs,
                                                 int32_t outputs, nv::PluginTensorDesc* supported,
                                                 int32_t count) noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual int32_t getAliasedInput(int32_t output) noexcept = 0;
  virtual int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept = 0;
  virtual int32_t getNbTactics() noexcept = 0;
  virtual char const* getTimingCacheID() noexcept = 0;
  virtual char const* getMetadataString() noexcept = 0;
};

class Expression {
 public:
  virtual int32_t getType() const noexcept = 0;
  virtual int32_t getDataType() const noexcept = 0;
  virtual void* getExpr() noexcept = 0;
};

// What the bindings hold of a list of expressions, and of launch parameters: a pointer to one of these.
class ExpressionsImpl {
 public:
  virtual Expression* get(int32_t index) const noexcept = 0;
  virtual bool set(int32_t index, Expression* expression) noexcept = 0;
  virtual int32_t size() const noexcept = 0;
  virtual bool resize(int32_t count) noexcept = 0;
  virtual ~ExpressionsImpl() noexcept = default;
};
class LaunchParametersImpl {
 public:
  virtual Expression* getGridX() noexcept = 0;
  virtual bool setGridX(Expression*) noexcept = 0;
  virtual Expression* getGridY() noexcept = 0;
  virtual bool setGridY(Expression*) noexcept = 0;
  virtual Expression* getGridZ() noexcept = 0;
  virtual bool setGridZ(Expression*) noexcept = 0;
  virtual Expression* getBlockX() noexcept = 0;
  virtual bool setBlockX(Expression*) noexcept = 0;
  virtual Expression* getBlockY() noexcept = 0;
  virtual bool setBlockY(Expression*) noexcept = 0;
  virtual Expression* getBlockZ() noexcept = 0;
  virtual bool setBlockZ(Expression*) noexcept = 0;
  virtual Expression* getSharedMem() noexcept = 0;
  virtual bool setSharedMem(Expression*) noexcept = 0;
  virtual ~LaunchParametersImpl() noexcept = default;
};
template <typename Impl>
class Handle {
 public:
  explicit Handle(Impl* impl) : impl_(impl) {}
  virtual ~Handle() noexcept = default;

 protected:
  Impl* impl_;
};

class QuickAotBuild : public QuickBuild {
 public:
  virtual int32_t getLaunchParams(nv::DimsExprs const* inputs, nv::DynamicPluginTensorDesc const* both,
                                  int32_t input_count, int32_t outputs, Handle<LaunchParametersImpl>* launch,
                                  Handle<ExpressionsImpl>* extra, nv::IExprBuilder& builder) noexcept = 0;
  virtual int32_t getKernel(nv::PluginTensorDesc const* in, int32_t inputs, nv::PluginTensorDesc const* out,
                            int32_t outputs, char const** name, char** code, int32_t* size) noexcept = 0;
  virtual int32_t setTactic(int32_t tactic) noexcept = 0;
};

enum class Request : int32_t { kStrictAot = 4 };

class QuickCreator : public nv::IPluginCreatorInterface {
 public:
  virtual nv::IPluginV3* createPlugin(char const* name, char const* space, nv::PluginFieldCollection const* fields,
                                      nv::TensorRTPhase phase, Request request) noexcept = 0;
  virtual nv::PluginFieldCollection const* getFieldNames() noexcept = 0;
  virtual char const* getPluginName() const noexcept = 0;
  virtual char const* getPluginVersion() const noexcept = 0;
  virtual char const* getPluginNamespace() const noexcept = 0;
};

// An expression as text.
class Dimension : public nv::IDimensionExpr, public nv::apiv::VDimensionExpr {
 public:
  explicit Dimension(std::string text) : text_(std::move(text)) { mImpl = this; }
  explicit Dimension(int64_t value) : text_(std::to_string(value)), constant_(true), value_(value) { mImpl = this; }
  bool isConstant() const override { return constant_; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }
  std::string const& text() const { return text_; }

 private:
  std::string text_;
  bool constant_ = false;
  int64_t value_ = INT64_MIN;
};

class Builder : public nv::IExprBuilder, public nv::apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  nv::IDimensionExpr const* constant(int64_t value) override { return Keep(value); }
  nv::IDimensionExpr const* operation(nv::DimensionOperation operation, nv::IDimensionExpr const& first,
                                      nv::IDimensionExpr const& second) override {
    static char const* const kForms[] = {"+", "*", "max", "min", "-", "equal", "less", "//", "cdiv"};
    auto const& a = static_cast<Dimension const&>(first);
    auto const& b = static_cast<Dimension const&>(second);
    std::string const form = kForms[static_cast<int>(operation)];
    if (form.size() > 2) return Keep(form + "(" + a.text() + ", " + b.text() + ")");
    return Keep("(" + a.text() + " " + form + " " + b.text() + ")");
  }
  nv::IDimensionExpr const* declareSizeTensor(int32_t, nv::IDimensionExpr const&, nv::IDimensionExpr const&) override {
    return nullptr;
  }
  template <typename T>
  Dimension const* Keep(T value) {
    kept_.push_back(std::make_unique<Dimension>(std::move(value)));
    return kept_.back().get();
  }

 private:
  std::vector<std::unique_ptr<Dimension>> kept_;
};

std::string TextOf(nv::IDimensionExpr const* expression) {
  return expression == nullptr ? "?" : static_cast<Dimension const*>(expression)->text();
}

std::string TextOf(Expression* expression) {
  constexpr int32_t kInt = 0, kInt32 = 2;
  if (expression == nullptr) return "?";
  if (expression->getType() != kInt || expression->getDataType() != kInt32) return "not an int32";
  return TextOf(static_cast<nv::IDimensionExpr const*>(expression->getExpr()));
}

class Expressions : public ExpressionsImpl {
 public:
  Expression* get(int32_t index) const noexcept override { return kept_.at(index); }
  bool set(int32_t index, Expression* expression) noexcept override {
    texts_.at(index) = TextOf(expression);  // it may be gone when the plugin returns
    kept_.at(index) = expression;
    return true;
  }
  int32_t size() const noexcept override { return static_cast<int32_t>(kept_.size()); }
  bool resize(int32_t count) noexcept override {
    kept_.resize(count);
    texts_.resize(count);
    return true;
  }
  std::vector<std::string> const& texts() const { return texts_; }

 private:
  std::vector<Expression*> kept_;
  std::vector<std::string> texts_;
};

class LaunchParameters : public LaunchParametersImpl {
 public:
  LaunchParameters() { all.resize(7); }
  Expression* getGridX() noexcept override { return all.get(0); }
  bool setGridX(Expression* value) noexcept override { return all.set(0, value); }
  Expression* getGridY() noexcept override { return all.get(1); }
  bool setGridY(Expression* value) noexcept override { return all.set(1, value); }
  Expression* getGridZ() noexcept override { return all.get(2); }
  bool setGridZ(Expression* value) noexcept override { return all.set(2, value); }
  Expression* getBlockX() noexcept override { return all.get(3); }
  bool setBlockX(Expression* value) noexcept override { return all.set(3, value); }
  Expression* getBlockY() noexcept override { return all.get(4); }
  bool setBlockY(Expression* value) noexcept override { return all.set(4, value); }
  Expression* getBlockZ() noexcept override { return all.get(5); }
  bool setBlockZ(Expression* value) noexcept override { return all.set(5, value); }
  Expression* getSharedMem() noexcept override { return all.get(6); }
  bool setSharedMem(Expression* value) noexcept override { return all.set(6, value); }
  Expressions all;
};

// The registry as TensorRT 11 lays it out; only what the bindings use of it does anything.
class Registry {
 public:
  virtual ~Registry() noexcept = default;
  virtual void setErrorRecorder(nv::IErrorRecorder*) noexcept {}
  virtual nv::IErrorRecorder* getErrorRecorder() const noexcept { return nullptr; }
  virtual bool isParentSearchEnabled() const { return true; }
  virtual void setParentSearchEnabled(bool) {}
  virtual void* loadLibrary(char const*) noexcept { return nullptr; }
  virtual void deregisterLibrary(void*) noexcept {}
  virtual bool registerCreator(nv::IPluginCreatorInterface& creator, char const* space) noexcept {
    auto& quick = static_cast<QuickCreator&>(creator);
    if (std::strcmp(creator.getInterfaceInfo().kind, "PLUGIN CREATOR_V3QUICK") != 0) return false;
    if (getCreator(quick.getPluginName(), quick.getPluginVersion(), space) != nullptr) return false;
    creators_.push_back(&creator);
    return true;
  }
  virtual nv::IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept {
    *count = static_cast<int32_t>(creators_.size());
    return creators_.data();
  }
  virtual nv::IPluginCreatorInterface* getCreator(char const* name, char const* version, char const* space) noexcept {
    for (auto* creator : creators_) {
      auto& quick = static_cast<QuickCreator&>(*creator);
      if (std::strcmp(quick.getPluginName(), name) == 0 && std::strcmp(quick.getPluginVersion(), version) == 0 &&
          std::strcmp(quick.getPluginNamespace(), space) == 0) {
        return creator;
      }
    }
    return nullptr;
  }
  virtual bool deregisterCreator(nv::IPluginCreatorInterface const&) noexcept { return false; }
  virtual nv::IPluginResource* acquirePluginResource(char const*, nv::IPluginResource*) noexcept { return nullptr; }
  virtual int32_t releasePluginResource(char const*) noexcept { return -1; }
  virtual nv::IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* count) noexcept {
    return getAllCreators(count);
  }

 private:
  std::vector<nv::IPluginCreatorInterface*> creators_;
};

Registry registry;
std::vector<std::string> codes;

std::string Joined(std::vector<std::string> const& words) {
  std::string text;
  for (auto const& word : words) text += (text.empty() ? "" : "|") + word;
  return text;
}

// The inputs of one node, as the builder describes them: what is -1 in `dims` lies between `min` and `max`.
struct Inputs {
  std::vector<nv::DataType> types;
  std::vector<int32_t> ranks;
  std::vector<nv::DynamicPluginTensorDesc> descriptors;
  std::vector<nv::DimsExprs> expressions;

  Inputs(int32_t count, int32_t const* given_types, int32_t const* given_ranks, int64_t const* low, int64_t const* high,
         Builder& builder)
      : ranks(given_ranks, given_ranks + count) {
    for (int32_t i = 0; i < count; ++i) {
      types.push_back(static_cast<nv::DataType>(given_types[i]));
      nv::DynamicPluginTensorDesc tensor{};
      nv::DimsExprs shape{};
      tensor.desc.type = types.back();
      tensor.desc.format = nv::TensorFormat::kLINEAR;
      tensor.desc.dims.nbDims = tensor.min.nbDims = tensor.max.nbDims = tensor.opt.nbDims = shape.nbDims = ranks[i];
      for (int32_t axis = 0; axis < ranks[i]; ++axis, ++low, ++high) {
        tensor.desc.dims.d[axis] = *low == *high ? *low : -1;
        tensor.min.d[axis] = *low;
        tensor.max.d[axis] = tensor.opt.d[axis] = *high;
        shape.d[axis] =
            *low == *high ? builder.constant(*low) : builder.Keep("d" + std::to_string(i) + "_" + std::to_string(axis));
      }
      descriptors.push_back(tensor);
      expressions.push_back(shape);
    }
  }
};

}  // namespace

extern "C" {

// What an engine would hold of a plugin without fields: lines of words between tabs, "failed" and the call that failed
// as the last one. `quick_code` then returns the code of tactic number `index`.
char const* quick_build(char const* name, char const* space, int32_t count, int32_t const* types, int32_t const* ranks,
                        int64_t const* low, int64_t const* high) {
  static std::string result;
  std::ostringstream out;
  codes.clear();
  auto const done = [&](char const* failed) {
    if (failed != nullptr) out << "failed\t" << failed << "\n";
    result = out.str();
    return result.c_str();
  };
  auto* creator = static_cast<QuickCreator*>(registry.getCreator(name, "1", space));
  if (creator == nullptr) return done("getCreator");
  auto const* fields = creator->getFieldNames();
  out << "fields\t" << (fields == nullptr ? -1 : fields->nbFields) << "\n";
  nv::PluginFieldCollection const none{0, nullptr};
  auto* plugin = creator->createPlugin(name, space, &none, nv::TensorRTPhase::kBUILD, Request::kStrictAot);
  if (plugin == nullptr) return done("createPlugin");
  plugin = plugin->clone();  // what a network holds
  if (plugin == nullptr) return done("clone");
  auto* capability = plugin->getCapabilityInterface(nv::PluginCapabilityType::kBUILD);
  if (capability == nullptr) return done("getCapabilityInterface");
  out << "interface\t" << capability->getInterfaceInfo().kind << "\n";
  auto* build = static_cast<QuickAotBuild*>(capability);

  Builder builder;
  Inputs const inputs(count, types, ranks, low, high, builder);
  int32_t const outputs = build->getNbOutputs();
  std::vector<nv::DataType> output_types(outputs);
  if (build->getOutputDataTypes(output_types.data(), outputs, inputs.types.data(), ranks, count) != 0) {
    return done("getOutputDataTypes");
  }
  std::vector<nv::DimsExprs> shapes(outputs);
  if (build->getOutputShapes(inputs.expressions.data(), count, nullptr, 0, shapes.data(), outputs, builder) != 0) {
    return done("getOutputShapes");
  }
  auto both = inputs.descriptors;
  for (int32_t i = 0; i < outputs; ++i) {
    std::vector<std::string> texts;
    nv::DynamicPluginTensorDesc tensor{};
    tensor.desc.type = output_types[i];
    tensor.desc.format = nv::TensorFormat::kLINEAR;
    tensor.desc.dims.nbDims = tensor.min.nbDims = tensor.max.nbDims = tensor.opt.nbDims = shapes[i].nbDims;
    for (int32_t axis = 0; axis < shapes[i].nbDims; ++axis) {
      texts.push_back(TextOf(shapes[i].d[axis]));
      tensor.desc.dims.d[axis] = -1;
    }
    both.push_back(tensor);
    out << "output\t" << static_cast<int>(output_types[i]) << "\t" << Joined(texts) << "\n";
  }

  int32_t const combinations = build->getNbSupportedFormatCombinations(both.data(), count, outputs);
  std::vector<nv::PluginTensorDesc> supported(combinations * both.size());
  if (build->getSupportedFormatCombinations(both.data(), count, outputs, supported.data(), combinations) != 0) {
    return done("getSupportedFormatCombinations");
  }
  for (auto const& tensor : supported) {
    out << "supported\t" << static_cast<int>(tensor.type) << "\t" << static_cast<int>(tensor.format) << "\n";
  }
  if (build->configurePlugin(both.data(), count, both.data() + count, outputs) != 0) return done("configurePlugin");
  std::vector<int32_t> tactics(build->getNbTactics());
  if (build->getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size())) != 0) return done("getValidTactics");
  std::vector<nv::PluginTensorDesc> flat;
  for (auto const& tensor : both) flat.push_back(tensor.desc);
  for (int32_t tactic : tactics) {
    LaunchParameters launch;
    Expressions extra;
    Handle<LaunchParametersImpl> launch_handle(&launch);
    Handle<ExpressionsImpl> extra_handle(&extra);
    if (build->setTactic(tactic) != 0) return done("setTactic");
    if (build->getLaunchParams(inputs.expressions.data(), both.data(), count, outputs, &launch_handle, &extra_handle,
                               builder) != 0) {
      return done("getLaunchParams");
    }
    char const* entry = nullptr;
    char* code = nullptr;
    int32_t size = 0;
    if (build->getKernel(flat.data(), count, flat.data() + count, outputs, &entry, &code, &size) != 0) {
      return done("getKernel");
    }
    codes.emplace_back(code, size);
    out << "tactic\t" << tactic << "\t" << entry << "\t" << Joined(launch.all.texts()) << "\t" << Joined(extra.texts())
        << "\n";
  }
  return done(nullptr);
}

char const* quick_code(int32_t index) { return codes.at(index).c_str(); }

// What the bindings need of TensorRT's libraries to load.
nv::IPluginRegistry* getPluginRegistry() noexcept { return reinterpret_cast<nv::IPluginRegistry*>(&registry); }
nv::IPluginRegistry* getBuilderPluginRegistry(nv::EngineCapability) noexcept { return getPluginRegistry(); }
void* createInferBuilder_INTERNAL(void*, int32_t) noexcept { return nullptr; }
void* createInferRuntime_INTERNAL(void*, int32_t) noexcept { return nullptr; }
void* createInferRefitter_INTERNAL(void*, void*, int32_t) noexcept { return nullptr; }
void* createNvOnnxParser_INTERNAL(void*, void*, int32_t) { return nullptr; }
void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int32_t) { return nullptr; }
int32_t getNvOnnxParserVersion() { return 0; }
bool initLibNvInferPlugins(void*, char const*) { return true; }
}
