// Which recipes serve a node on a device; see "Which recipe a device takes" in docs/kernel-packs.md.
#ifndef LONGSPAN_CUDA_SELECTION_H_
#define LONGSPAN_CUDA_SELECTION_H_

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/driver.h"
#include "cuda/node.h"
#include "cuda/pack.h"

namespace longspan::cuda {

// No pack has a kernel for a node on a device; the message says what is missing.
class NoKernel : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Candidate {
  std::shared_ptr<const Pack> pack;
  const Recipe* recipe;
};

// Recipes for the same nodes, those that the device prefers first.
using Candidates = std::vector<Candidate>;

// How `node` differs from those of `recipe`; empty where it is one of them. What `sizes` does not know differs in
// nothing.
std::string Mismatch(const Recipe& recipe, const Node& node, const Sizes& sizes);

// The sizes that a recipe asks for; -1 where any will do.
Sizes Needed(const Recipe& recipe);

// Whether sizes that are all known are those.
bool Fits(const Sizes& needed, const Sizes& sizes);

// Every recipe of the packs that `device` can run and `node` may turn out to be for, one list per kind of node, in the
// packs' order. Throws NoKernel where there is none.
std::vector<Candidates> Select(const std::vector<std::shared_ptr<const Pack>>& packs, const Node& node,
                               const Device& device);

}  // namespace longspan::cuda

#endif  // LONGSPAN_CUDA_SELECTION_H_
