#include "tensorrt/fields.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "attention/operands.h"
#include "cuda/text.h"

namespace longspan::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

const char* Name(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT16:
      return "FLOAT16";
    case PluginFieldType::kFLOAT32:
      return "FLOAT32";
    case PluginFieldType::kFLOAT64:
      return "FLOAT64";
    case PluginFieldType::kINT8:
      return "INT8";
    case PluginFieldType::kINT16:
      return "INT16";
    case PluginFieldType::kINT32:
      return "INT32";
    case PluginFieldType::kINT64:
      return "INT64";
    case PluginFieldType::kCHAR:
      return "CHAR";
    default:
      return "another type";
  }
}

[[noreturn]] void Mistyped(const PluginField& field, const char* wanted) {
  Fail("field ", field.name, " is ", field.length, " of ", Name(field.type), ": must be ", wanted);
}

// The values of a field of INT32 or INT64. Its data may lie anywhere.
std::vector<int64_t> Integers(const PluginField& field) {
  std::vector<int64_t> values(static_cast<size_t>(field.length));
  const auto* data = static_cast<const char*>(field.data);
  for (size_t i = 0; i < values.size(); ++i) {
    if (field.type == PluginFieldType::kINT64) {
      std::memcpy(&values[i], data + 8 * i, 8);
    } else {
      int32_t value = 0;
      std::memcpy(&value, data + 4 * i, 4);
      values[i] = value;
    }
  }
  return values;
}

bool IsInteger(PluginFieldType type) { return type == PluginFieldType::kINT32 || type == PluginFieldType::kINT64; }

}  // namespace

FieldReader::FieldReader(const nvinfer1::PluginFieldCollection* fields, const std::vector<std::string>& allowed) {
  if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr)) {
    Fail("no fields were given; allowed: ", cuda::Joined(allowed, ", "));
  }
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    if (field.name == nullptr) Fail("field number ", i, " has no name");
    if (std::find(allowed.begin(), allowed.end(), field.name) == allowed.end()) {
      Fail("unknown field ", cuda::Quoted(field.name), "; allowed: ", cuda::Joined(allowed, ", "));
    }
    if (Find(field.name) != nullptr) Fail("field ", field.name, " is given twice");
    if (field.length < 0 || (field.length > 0 && field.data == nullptr)) {
      Fail("field ", field.name, " has ", field.length, " values", field.data == nullptr ? " and no data" : "");
    }
    fields_.push_back(&field);
  }
}

const PluginField* FieldReader::Find(std::string_view name) const {
  const auto found =
      std::find_if(fields_.begin(), fields_.end(), [name](const PluginField* field) { return field->name == name; });
  return found == fields_.end() ? nullptr : *found;
}

int64_t FieldReader::Int(const char* name, int64_t fallback) const {
  const PluginField* field = Find(name);
  if (field == nullptr) return fallback;
  if (!IsInteger(field->type) || field->length != 1) Mistyped(*field, "1 of INT32 or INT64");
  return Integers(*field)[0];
}

float FieldReader::Float(const char* name, float fallback) const {
  const PluginField* field = Find(name);
  if (field == nullptr) return fallback;
  if (field->type != PluginFieldType::kFLOAT32 || field->length != 1) Mistyped(*field, "1 of FLOAT32");
  float value = 0;
  std::memcpy(&value, field->data, sizeof value);
  return value;
}

std::vector<int64_t> FieldReader::Ints(const char* name, const std::vector<int64_t>& fallback) const {
  const PluginField* field = Find(name);
  if (field == nullptr) return fallback;
  if (!IsInteger(field->type) || field->length < 1) Mistyped(*field, "1 or more of INT32 or INT64");
  return Integers(*field);
}

std::vector<std::string> FieldReader::Strings(const char* name) const {
  const PluginField* field = Find(name);
  if (field == nullptr) return {};
  if (field->type != PluginFieldType::kCHAR) Mistyped(*field, "CHAR, each string ended by a zero");
  std::string_view text(static_cast<const char*>(field->data), static_cast<size_t>(field->length));
  if (!text.empty() && text.back() == '\0') text.remove_suffix(1);
  std::vector<std::string> strings;
  for (const std::string_view part : cuda::Split(text, '\0')) strings.emplace_back(part);
  return strings;
}

std::vector<uint8_t> FieldReader::Bytes(const char* name) const {
  const PluginField* field = Find(name);
  if (field == nullptr) return {};
  if (field->type != PluginFieldType::kINT8) Mistyped(*field, "INT8");
  const auto* data = static_cast<const uint8_t*>(field->data);
  return std::vector<uint8_t>(data, data + field->length);
}

void FieldList::Add(const std::string& name, const void* data, PluginFieldType type, size_t length) {
  if (length > static_cast<size_t>(std::numeric_limits<int32_t>::max())) Fail(name, " has ", length, " values");
  names_.push_back(name);
  fields_.emplace_back(names_.back().c_str(), data, type, static_cast<int32_t>(length));
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

void FieldList::Copy(const std::string& name, const void* data, size_t bytes, PluginFieldType type, size_t length) {
  values_.emplace_back(static_cast<const char*>(data), bytes);
  Add(name, values_.back().data(), type, length);
}

void FieldList::AddInts(const std::string& name, const std::vector<int64_t>& values) {
  const std::vector<int32_t> narrow(values.begin(), values.end());
  Copy(name, narrow.data(), narrow.size() * sizeof(int32_t), PluginFieldType::kINT32, narrow.size());
}

void FieldList::AddFloat(const std::string& name, float value) {
  Copy(name, &value, sizeof value, PluginFieldType::kFLOAT32, 1);
}

void FieldList::AddStrings(const std::string& name, const std::vector<std::string>& values) {
  std::string text;
  for (const std::string& value : values) text += value + '\0';
  Copy(name, text.data(), text.size(), PluginFieldType::kCHAR, text.size());
}

void FieldList::AddBytes(const std::string& name, const std::vector<uint8_t>& data) {
  Add(name, data.data(), PluginFieldType::kINT8, data.size());
}

void FieldList::Announce(const std::string& name, PluginFieldType type) { Add(name, nullptr, type, 0); }

}  // namespace longspan::trt
