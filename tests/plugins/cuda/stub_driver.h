// How tests steer the stub of the CUDA driver and read what it was asked.
#ifndef LONGSPAN_TESTS_CUDA_STUB_DRIVER_H_
#define LONGSPAN_TESTS_CUDA_STUB_DRIVER_H_

#include <map>
#include <string>
#include <vector>

struct Stub {
  int capability = 90;
  int multiprocessors = 132;
  int shared_memory = 232448;
  int threads = 1024;                        // that a block of any function may have
  std::map<std::string, int> failures = {};  // what functions return, by name
  int contexts = 0;                          // retained
  int modules = 0;                           // loaded
  std::vector<std::string> calls = {};
};

// The symbol "GetStub" of the stub.
using GetStubFunction = Stub* (*)();

#endif  // LONGSPAN_TESTS_CUDA_STUB_DRIVER_H_
