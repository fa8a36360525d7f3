// The three parts of router_stats.
#pragma once

#include "launch.h"

namespace moekern::cuda {

void add_scores(const RouterStats& args, cudaStream_t stream);      // score_sum, entropy_sum, margin_sum
void add_slots(const RouterStats& args, cudaStream_t stream);       // what the chosen slots say, and the tokens
void add_logit_gram(const RouterStats& args, cudaStream_t stream);

}  // namespace moekern::cuda
