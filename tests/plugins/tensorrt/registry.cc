// Stands for libnvinfer.so.* as far as loader.cc needs it: a registry that loads libraries of plugins as TensorRT's
// does, and refuses those whose plugins it has.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <set>
#include <string>

namespace {

namespace nv = nvinfer1;

std::set<std::string> names;
std::string listed;

class Registry final : public nv::IPluginRegistry {
 public:
  PluginLibraryHandle loadLibrary(nv::AsciiChar const* path) noexcept override {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return nullptr;
    using GetCreators = nv::IPluginCreatorInterface* const* (*)(int32_t&);
    const auto get = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
    if (get == nullptr) return nullptr;
    int32_t count = 0;
    auto* const* creators = get(count);
    for (int32_t i = 0; i < count; ++i) {
      auto& creator = static_cast<nv::IPluginCreatorV3One&>(*creators[i]);
      const std::string name = std::string(creator.getPluginNamespace()) + "::" + creator.getPluginName();
      if (!names.insert(name).second) return nullptr;
    }
    return library;
  }

  void setErrorRecorder(nv::IErrorRecorder*) noexcept override {}
  nv::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  bool registerCreator(nv::IPluginCreatorInterface&, nv::AsciiChar const*) noexcept override { return false; }
  nv::IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override { return nullptr; }
  nv::IPluginCreatorInterface* getCreator(nv::AsciiChar const*, nv::AsciiChar const*,
                                          nv::AsciiChar const*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(nv::IPluginCreatorInterface const&) noexcept override { return false; }
  nv::IPluginResource* acquirePluginResource(nv::AsciiChar const*, nv::IPluginResource*) noexcept override {
    return nullptr;
  }
  int32_t releasePluginResource(nv::AsciiChar const*) noexcept override { return 0; }
  nv::IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override { return nullptr; }
#if NV_TENSORRT_MAJOR == 10
  bool registerCreator(nv::IPluginCreator&, nv::AsciiChar const*) noexcept override { return false; }
  nv::IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
  nv::IPluginCreator* getPluginCreator(nv::AsciiChar const*, nv::AsciiChar const*,
                                       nv::AsciiChar const*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(nv::IPluginCreator const&) noexcept override { return false; }
#endif
};

Registry registry;

}  // namespace

extern "C" {

nv::IPluginRegistry* getPluginRegistry() noexcept { return &registry; }

const char* Registered() {
  listed.clear();
  for (const std::string& name : names) listed += name + " ";
  return listed.c_str();
}
}
