// What the fields of a kernel pack may hold. Every check throws InvalidPack with the place.
#ifndef LONGSPAN_CUDA_PACK_RULES_H_
#define LONGSPAN_CUDA_PACK_RULES_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/operators.h"
#include "cuda/pack.h"

namespace longspan::cuda {

// The meaning of a parameter by its KIND; a stride's depends on WHAT. Empty where there is no such kind.
std::optional<Meaning> MeaningOf(std::string_view kind, std::string_view what);

// Fields that only people read.
void CheckAbout(const std::string& kernel, int head_size, int v_head_size, int stages, std::string_view function);
void CheckFeatures(const std::string& kernel, std::string_view features);
void CheckConstant(const std::string& kernel, std::string_view name, std::string_view value);

// Checks a recipe's head, and knows what its paths may name.
class RecipeRules {
 public:
  // The pack has its kernels already; paths add the names of their sizes to it.
  RecipeRules(const Recipe& recipe, Pack* pack);

  const Recipe& recipe;
  Pack& pack;
  const OperatorFact* op = nullptr;

 private:
  void CheckMatch() const;
};

// Makes a path of its lines.
class PathRules {
 public:
  PathRules(const RecipeRules& recipe, std::string_view name, std::string_view condition);

  void AddSize(std::string_view name, std::string_view expression);
  void AddBuffer(std::string_view name, std::string_view type, bool zeroed, std::string_view elements);
  void AddLaunch(int64_t kernel);
  Path Finish();

 private:
  Expression Parse(std::string_view text, const std::string& where) const;
  Argument Resolve(const Parameter& parameter, const std::string& where) const;
  Argument ResolveStride(const Parameter& parameter, const std::string& where) const;
  int FindInput(std::string_view name, const std::string& where) const;

  const RecipeRules& recipe_;
  std::string where_;
  std::vector<bool> known_;
  Path path_;
};

// The rules that hold between records: kernels, order, the last path, kernels that nothing launches.
void CheckPack(const Pack& pack);

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_PACK_RULES_H_
