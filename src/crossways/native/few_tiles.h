// Expert compute for few tokens in bfloat16: on the matrix unit, however few they are.
//
// 32 rows of weights meet up to 32 tokens at once while the rows after these are asked for: the unit has no more to do
// than to read. A gated layer's two rows of one hidden value are in one block.
#pragma once
#include "few.h"

namespace crossways {

// `hidden` and `inputs` are panels of 32 pairs of one expert, [value / 2][32] words.
struct FewTiles : Few {
  using Value = bf16;
  static constexpr int64_t SIDE_OF_PUT = SIDE;
  ...
};

}  // namespace crossways
