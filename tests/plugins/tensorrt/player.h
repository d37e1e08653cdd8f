// Plays TensorRT's builder and runtime for a plugin: what it is created from, asked, given and told.
#ifndef LONGSPAN_TESTS_TENSORRT_PLAYER_H_
#define LONGSPAN_TESTS_TENSORRT_PLAYER_H_

#include <NvInferRuntime.h>

#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "attention/operands.h"
#include "tensorrt/attention_creator.h"
#include "tensorrt/messages.h"

namespace longspan::testing {

using nvinfer1::DataType;
using nvinfer1::PluginFieldType;

// Values of the symbols in a network's dimensions.
using Symbols = std::map<std::string, int64_t>;

// A dimension that is evaluated later, for many values of its symbols.
class Dimension final : public nvinfer1::IDimensionExpr {
 public:
  using Function = std::function<int64_t(const Symbols&)>;

  Dimension(bool constant, Function value) : value_(std::move(value)) {
    tree_.constant = constant;
    tree_.value = constant ? value_({}) : std::numeric_limits<int64_t>::min();
    mImpl = &tree_;
  }
  ~Dimension() override = default;

  int64_t Value(const Symbols& symbols) const { return value_(symbols); }

 private:
  struct Tree final : nvinfer1::apiv::VDimensionExpr {
    bool isConstant() const override { return constant; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }
    bool constant = false;
    int64_t value = 0;
  };

  const Function value_;
  Tree tree_;
};

class ExpressionBuilder final : public nvinfer1::IExprBuilder {
 public:
  ExpressionBuilder() { mImpl = &tree_; }
  ~ExpressionBuilder() override = default;

  const Dimension* Symbol(const std::string& name) {
    return tree_.Make(false, [name](const Symbols& symbols) { return symbols.at(name); });
  }
  // A number is a constant, anything else a symbol.
  nvinfer1::DimsExprs Shape(const std::vector<std::string>& axes) {
    nvinfer1::DimsExprs shape{static_cast<int32_t>(axes.size()), {}};
    for (size_t i = 0; i < axes.size(); ++i) {
      const bool number = axes[i].find_first_not_of("0123456789") == std::string::npos;
      shape.d[i] = number ? constant(std::stoll(axes[i])) : Symbol(axes[i]);
    }
    return shape;
  }
  // Whether operations fail from now on.
  void Fail() { tree_.fails = true; }

 private:
  struct Tree final : nvinfer1::apiv::VExprBuilder {
    const Dimension* Make(bool constant, Dimension::Function value) {
      made.push_back(std::make_unique<Dimension>(constant, std::move(value)));
      return made.back().get();
    }
    const nvinfer1::IDimensionExpr* constant(int64_t value) override {
      return Make(true, [value](const Symbols&) { return value; });
    }
    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation operation,
                                              const nvinfer1::IDimensionExpr& first,
                                              const nvinfer1::IDimensionExpr& second) override {
      if (fails) return nullptr;
      const auto &a = static_cast<const Dimension&>(first), &b = static_cast<const Dimension&>(second);
      const bool product = operation == nvinfer1::DimensionOperation::kPROD;
      if (!product && operation != nvinfer1::DimensionOperation::kFLOOR_DIV) return nullptr;
      return Make(a.isConstant() && b.isConstant(), [product, &a, &b](const Symbols& symbols) {
        return product ? a.Value(symbols) * b.Value(symbols) : a.Value(symbols) / b.Value(symbols);
      });
    }
    const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                      const nvinfer1::IDimensionExpr&) override {
      return nullptr;
    }
    bool fails = false;
    std::vector<std::unique_ptr<Dimension>> made;
  };

  Tree tree_;
};

// Fields as TensorRT's ONNX parser makes them: ints of 32 bits, strings that end with zeros, each value in memory of
// its own and exact size, so that the sanitizers see who reads on.
class Fields {
 public:
  Fields& Raw(const std::string& name, PluginFieldType type, const void* data, size_t bytes, int32_t length) {
    const auto* start = static_cast<const uint8_t*>(data);
    values_[name] = {type, length, std::make_shared<std::vector<uint8_t>>(start, start + bytes)};
    return *this;
  }
  Fields& Ints(const std::string& name, const std::vector<int32_t>& values) {
    return Raw(name, PluginFieldType::kINT32, values.data(), 4 * values.size(), static_cast<int32_t>(values.size()));
  }
  Fields& Float(const std::string& name, float value) { return Raw(name, PluginFieldType::kFLOAT32, &value, 4, 1); }
  Fields& Strings(const std::string& name, const std::vector<std::string>& values) {
    std::string text;
    for (const std::string& value : values) text += value + '\0';
    return Raw(name, PluginFieldType::kCHAR, text.data(), text.size(), static_cast<int32_t>(text.size()));
  }
  Fields& Bytes(const std::string& name, const std::vector<uint8_t>& data) {
    return Raw(name, PluginFieldType::kINT8, data.data(), data.size(), static_cast<int32_t>(data.size()));
  }
  Fields& Without(const std::string& name) {
    values_.erase(name);
    return *this;
  }
  // What an engine keeps of a plugin: a copy, as the plugin is gone when the engine is read.
  static Fields Of(const nvinfer1::PluginFieldCollection& collection) {
    Fields copy;
    for (int32_t i = 0; i < collection.nbFields; ++i) {
      const nvinfer1::PluginField& field = collection.fields[i];
      const bool bytes = field.type == PluginFieldType::kCHAR || field.type == PluginFieldType::kINT8;
      copy.Raw(field.name, field.type, field.data, static_cast<size_t>(field.length) * (bytes ? 1 : 4), field.length);
    }
    return copy;
  }

  // Valid as long as nothing changes.
  const nvinfer1::PluginFieldCollection* Collection() {
    fields_.clear();
    for (const auto& [name, value] : values_) {
      fields_.emplace_back(name.c_str(), value.data->data(), value.type, value.length);
    }
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }
  bool Has(const std::string& name) const { return values_.count(name) > 0; }
  const std::vector<uint8_t>& Data(const std::string& name) const { return *values_.at(name).data; }

 private:
  struct Value {
    PluginFieldType type;
    int32_t length;
    std::shared_ptr<std::vector<uint8_t>> data;
  };

  std::map<std::string, Value> values_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_;
};

// The logger that TensorRT gives the library, once a process.
class Log final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (severity <= Severity::kERROR) lines_ += std::string(message) + "\n";
  }
  // What was said since the last time.
  std::string Take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string taken;
    taken.swap(lines_);
    return taken;
  }

  static Log& Shared() {
    static Log log;
    static Finder finder;
    trt::SetLoggerFinder(&finder);
    return log;
  }

 private:
  struct Finder final : nvinfer1::ILoggerFinder {
    nvinfer1::ILogger* findLogger() override { return &Shared(); }
    ~Finder() override = default;
  };

  std::mutex mutex_;
  std::string lines_;
};

class Recorder final : public nvinfer1::IErrorRecorder {
 public:
  int32_t getNbErrors() const noexcept override { return static_cast<int32_t>(errors.size()); }
  nvinfer1::ErrorCode getErrorCode(int32_t index) const noexcept override { return errors[index].first; }
  ErrorDesc getErrorDesc(int32_t index) const noexcept override { return errors[index].second.c_str(); }
  bool hasOverflowed() const noexcept override { return false; }
  void clear() noexcept override { errors.clear(); }
  bool reportError(nvinfer1::ErrorCode code, ErrorDesc text) noexcept override {
    errors.emplace_back(code, text);
    return false;
  }
  RefCount incRefCount() noexcept override { return 1; }
  RefCount decRefCount() noexcept override { return 1; }

  std::vector<std::pair<nvinfer1::ErrorCode, std::string>> errors;
};

// Device memory that is never touched.
class Allocator final : public nvinfer1::IGpuAllocator {
 public:
  void* allocate(uint64_t size, uint64_t alignment, nvinfer1::AllocatorFlags) noexcept override {
    if (fail) return nullptr;
    next_ = (next_ + alignment - 1) / alignment * alignment;
    void* const memory = reinterpret_cast<void*>(next_);
    next_ += size;
    live.insert(memory);
    ++calls;
    return memory;
  }
  bool deallocate(void* memory) noexcept override { return live.erase(memory) == 1; }

  std::set<void*> live;
  int calls = 0;
  bool fail = false;

 private:
  uint64_t next_ = 0x7000000010;
};

struct Context final : nvinfer1::IPluginResourceContext {
  nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return &allocator; }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return &recorder; }
  ~Context() noexcept override = default;

  mutable Allocator allocator;
  mutable Recorder recorder;
};

inline nvinfer1::Dims DimsOf(const Shape& shape) {
  nvinfer1::Dims dims{static_cast<int32_t>(shape.size()), {}};
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

struct Tensor {
  DataType type;
  Shape shape;

  nvinfer1::PluginTensorDesc Describe() const { return {DimsOf(shape), type, nvinfer1::TensorFormat::kLINEAR, -1.0f}; }
};

inline std::vector<nvinfer1::PluginTensorDesc> Describe(const std::vector<Tensor>& tensors) {
  std::vector<nvinfer1::PluginTensorDesc> described;
  for (const Tensor& tensor : tensors) described.push_back(tensor.Describe());
  return described;
}

// A profile from `low` to `high`: what differs varies.
inline std::vector<nvinfer1::DynamicPluginTensorDesc> Profile(const std::vector<Tensor>& low,
                                                              const std::vector<Tensor>& high) {
  std::vector<nvinfer1::DynamicPluginTensorDesc> profile;
  for (size_t i = 0; i < low.size(); ++i) {
    nvinfer1::DynamicPluginTensorDesc one{high[i].Describe(), DimsOf(low[i].shape), DimsOf(high[i].shape),
                                          DimsOf(high[i].shape)};
    for (int32_t axis = 0; axis < one.desc.dims.nbDims; ++axis) {
      if (one.min.d[axis] != one.max.d[axis]) one.desc.dims.d[axis] = -1;
    }
    profile.push_back(one);
  }
  return profile;
}

// A plugin with its capabilities, owned.
class Plugin {
 public:
  explicit Plugin(nvinfer1::IPluginV3* made) : plugin_(made) {
    if (made == nullptr) return;
    core = static_cast<nvinfer1::IPluginV3OneCore*>(Find(nvinfer1::PluginCapabilityType::kCORE));
    build = static_cast<nvinfer1::IPluginV3OneBuild*>(Find(nvinfer1::PluginCapabilityType::kBUILD));
    runtime = static_cast<nvinfer1::IPluginV3OneRuntime*>(Find(nvinfer1::PluginCapabilityType::kRUNTIME));
  }
  explicit operator bool() const { return plugin_ != nullptr; }
  Plugin Clone() const { return Plugin(plugin_->clone()); }
  Plugin Attach(Context* context) const { return Plugin(runtime->attachToContext(context)); }

  int32_t Announce(const std::vector<Tensor>& in, const std::vector<Tensor>& out) const {
    const auto ins = Describe(in), outs = Describe(out);
    return runtime->onShapeChange(ins.data(), static_cast<int32_t>(ins.size()), outs.data(),
                                  static_cast<int32_t>(outs.size()));
  }

  nvinfer1::IPluginV3OneCore* core = nullptr;
  nvinfer1::IPluginV3OneBuild* build = nullptr;
  nvinfer1::IPluginV3OneRuntime* runtime = nullptr;

 private:
  nvinfer1::IPluginCapability* Find(nvinfer1::PluginCapabilityType type) {
    return plugin_->getCapabilityInterface(type);
  }

  std::unique_ptr<nvinfer1::IPluginV3> plugin_;
};

}  // namespace longspan::testing

#endif  // LONGSPAN_TESTS_TENSORRT_PLAYER_H_
