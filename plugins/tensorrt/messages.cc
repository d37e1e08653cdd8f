#include "tensorrt/messages.h"

#include <atomic>
#include <cstdio>

namespace longspan::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> g_finder{nullptr};

nvinfer1::ILogger* FindLogger() {
  nvinfer1::ILoggerFinder* const finder = g_finder.load();
  return finder != nullptr ? finder->findLogger() : nullptr;
}

}  // namespace

void SetLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  nvinfer1::ILoggerFinder* none = nullptr;
  if (finder != nullptr) g_finder.compare_exchange_strong(none, finder);
}

void Report(const std::string& who, const char* what, nvinfer1::IErrorRecorder* recorder,
            nvinfer1::ErrorCode code) noexcept {
  try {
    const std::string line = who + ": " + what;
    if (nvinfer1::ILogger* const logger = FindLogger()) {
      logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    } else {
      std::fprintf(stderr, "%s\n", line.c_str());
    }
    if (recorder != nullptr) recorder->reportError(code, line.c_str());
  } catch (...) {  // no memory for the message, or a finder that throws: nobody to tell
  }
}

}  // namespace longspan::trt
