// SHA-256 (FIPS 180-4), with which kernel packs find damage.
#ifndef LONGSPAN_CUDA_SHA256_H_
#define LONGSPAN_CUDA_SHA256_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace longspan::cuda {

using Digest = std::array<uint8_t, 32>;

class Sha256 {
 public:
  void Update(const uint8_t* data, size_t size);
  // Ends the message.
  Digest Finish();

 private:
  void Block(const uint8_t* data);

  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t buffer_[64] = {};
  uint64_t size_ = 0;
};

// Lower-case hexadecimal digits.
std::string Hex(const Digest& digest);

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_SHA256_H_
