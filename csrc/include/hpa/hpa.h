// Everything of the C++ API.
#pragma once

#include "hpa/cholesky.h"
#include "hpa/column_mask.h"
#include "hpa/column_scores.h"
#include "hpa/gram.h"
#include "hpa/inverse_diagonal.h"
#include "hpa/low_rank.h"
#include "hpa/project_merge.h"
#include "hpa/routed_lora.h"
#include "hpa/routed_lora_backward.h"
#include "hpa/runtime.h"
#include "hpa/types.h"
