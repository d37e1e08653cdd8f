// The fields that describe a plugin: read from whoever creates it, and kept for the engine.
#ifndef LONGSPAN_TENSORRT_FIELDS_H_
#define LONGSPAN_TENSORRT_FIELDS_H_

#include <NvInferRuntime.h>

#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

namespace longspan::trt {

// Reads fields strictly, since one that is misread would change results. Throws std::invalid_argument, also where there
// is a field of a name that is not allowed, or two of one name.
class FieldReader {
 public:
  FieldReader(const nvinfer1::PluginFieldCollection* fields, const std::vector<std::string>& allowed);

  bool Has(const char* name) const { return Find(name) != nullptr; }
  int64_t Int(const char* name, int64_t fallback) const;
  float Float(const char* name, float fallback) const;
  // One value or several.
  std::vector<int64_t> Ints(const char* name, const std::vector<int64_t>& fallback) const;
  // Each ends with a zero, as ONNX STRINGS arrive; none where there is no such field.
  std::vector<std::string> Strings(const char* name) const;
  // None where there is no such field.
  std::vector<uint8_t> Bytes(const char* name) const;

 private:
  const nvinfer1::PluginField* Find(std::string_view name) const;

  std::vector<const nvinfer1::PluginField*> fields_;
};

// Fields with their data, in the order of addition.
class FieldList {
 public:
  FieldList() = default;
  FieldList(const FieldList&) = delete;
  FieldList& operator=(const FieldList&) = delete;

  void AddInts(const std::string& name, const std::vector<int64_t>& values);  // each fits int32
  void AddFloat(const std::string& name, float value);
  void AddStrings(const std::string& name, const std::vector<std::string>& values);
  // Not copied: the data must live as long as the list.
  void AddBytes(const std::string& name, const std::vector<uint8_t>& data);
  // A name and a type without data, as creators announce fields. `type` as in PluginFieldType.
  void Announce(const std::string& name, nvinfer1::PluginFieldType type);

  // Valid until a field is added. Several threads may ask at once.
  const nvinfer1::PluginFieldCollection* Collection() const { return &collection_; }

 private:
  void Add(const std::string& name, const void* data, nvinfer1::PluginFieldType type, size_t length);
  void Copy(const std::string& name, const void* data, size_t bytes, nvinfer1::PluginFieldType type, size_t length);

  std::deque<std::string> names_, values_;  // which do not move when they grow
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace longspan::trt

#endif  // LONGSPAN_TENSORRT_FIELDS_H_
