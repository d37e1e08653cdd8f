// Reading text strictly: the same for every locale.
#ifndef LONGSPAN_CUDA_TEXT_H_
#define LONGSPAN_CUDA_TEXT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace longspan::cuda {

inline bool IsDigit(char c) { return c >= '0' && c <= '9'; }
inline bool IsLetter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

// Whether the text is one of the operators of a size expression.
bool IsOperator(std::string_view token);

// The parts between separators; one more than there are separators.
inline std::vector<std::string_view> Split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  while (true) {
    const size_t end = text.find(separator);
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

// Decimal without sign and leading zeros, of up to `digits` digits (at most 19) and up to `largest`.
inline std::optional<int64_t> WholeNumber(std::string_view text, size_t digits, int64_t largest) {
  if (text.empty() || text.size() > digits || (text[0] == '0' && text.size() > 1)) return std::nullopt;
  uint64_t value = 0;  // 19 digits fit
  for (const char c : text) {
    if (!IsDigit(c)) return std::nullopt;
    value = 10 * value + static_cast<uint64_t>(c - '0');
  }
  if (value > static_cast<uint64_t>(largest)) return std::nullopt;
  return static_cast<int64_t>(value);
}

// In quotes, and cut where it is long, for messages.
inline std::string Quoted(std::string_view text) {
  return "'" + std::string(text.substr(0, 120)) + (text.size() > 120 ? "…'" : "'");
}

// Parts with a separator between them.
template <typename Parts>
std::string Joined(const Parts& parts, const char* separator = ",") {
  std::string text;
  bool first = true;
  for (const auto& part : parts) {
    if (!first) text += separator;
    text += part;
    first = false;
  }
  return text;
}

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_TEXT_H_
