// What Python cannot ask of a C++ plugin: its clones and what an engine keeps of it. Called by
// tests/plugins/test_tensorrt_registry.py in a process in which TensorRT's own registry has loaded the library.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace {

using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
using nvinfer1::PluginCapabilityType;

std::string Describe(nvinfer1::IPluginV3* plugin) {
  if (plugin == nullptr) return "none";
  auto* build = static_cast<nvinfer1::IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
  auto* core = static_cast<nvinfer1::IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
  return std::string(core->getPluginNamespace()) + "::" + core->getPluginName() + " " + core->getPluginVersion() + " " +
         build->getTimingCacheID();
}

}  // namespace

extern "C" {

struct Field {
  const char* name;
  const void* data;
  int32_t type, length;
};

// Lines "made …", "clone …", "field NAME TYPE LENGTH" for each field of the clone's clone, "recreated …" of those
// fields; "error …" where something is not there. The library must be loaded already.
__attribute__((visibility("default"))) const char* RoundTrip(const char* library, const char* name, const Field* given,
                                                             int32_t count) {
  static std::string text;
  std::ostringstream lines;
  const auto finish = [&](const std::string& last) {
    text = lines.str() + last;
    return text.c_str();
  };
  void* const handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) return finish("error the registry has not loaded the library");
  int32_t creators = 0;
  nvinfer1::IPluginCreatorV3One* creator = nullptr;
  nvinfer1::IPluginCreatorInterface* const* all = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"))(creators);
  for (int32_t i = 0; i < creators; ++i) {
    auto* one = static_cast<nvinfer1::IPluginCreatorV3One*>(all[i]);
    if (std::string(one->getPluginName()) == name) creator = one;
  }
  if (creator == nullptr) return finish("error no creator");
  std::vector<nvinfer1::PluginField> fields;
  for (int32_t i = 0; i < count; ++i) {
    fields.emplace_back(given[i].name, given[i].data, static_cast<nvinfer1::PluginFieldType>(given[i].type),
                        given[i].length);
  }
  const nvinfer1::PluginFieldCollection collection{count, fields.data()};
  const std::unique_ptr<nvinfer1::IPluginV3> made(
      creator->createPlugin("node", &collection, nvinfer1::TensorRTPhase::kBUILD));
  lines << "made " << Describe(made.get()) << "\n";
  if (made == nullptr) return finish("");
  const std::unique_ptr<nvinfer1::IPluginV3> clone(made->clone());
  lines << "clone " << Describe(clone.get()) << "\n";
  auto* runtime =
      static_cast<nvinfer1::IPluginV3OneRuntime*>(clone->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  const nvinfer1::PluginFieldCollection* saved = runtime->getFieldsToSerialize();
  if (saved == nullptr) return finish("error no fields");
  for (int32_t i = 0; i < saved->nbFields; ++i) {
    const nvinfer1::PluginField& field = saved->fields[i];
    lines << "field " << field.name << " " << static_cast<int32_t>(field.type) << " " << field.length << "\n";
  }
  const std::unique_ptr<nvinfer1::IPluginV3> recreated(
      creator->createPlugin("node", saved, nvinfer1::TensorRTPhase::kRUNTIME));
  lines << "recreated " << Describe(recreated.get()) << "\n";
  dlclose(handle);
  return finish("");
}

}  // extern "C"
