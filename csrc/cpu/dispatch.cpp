#include "cpu/dispatch.h"

#include <atomic>
#include <cstring>

#include "cpu/processor.h"
#include "hpa/runtime.h"

namespace hpa::cpu {
namespace {

struct InstructionSet {
  const char* name;
  Kernels kernels;
  bool (*enable)() = nullptr;  // what must succeed before its kernels run
};

// Slowest first. An instruction set is filled in only where the processor has it.
struct Available {
  InstructionSet sets[5] = {};
  int count = 0;
  char names[64] = "";
  std::atomic<int> chosen{0};

  Available() {
    add("portable", [](Kernels& kernels) {
      isa_portable::fill_gram(kernels);
      isa_portable::fill_inverse_diagonal(kernels);
      isa_portable::fill_column_scores(kernels);
      isa_portable::fill_project_merge(kernels);
      isa_portable::fill_routed_lora(kernels);
      isa_portable::fill_low_rank(kernels);
    });
#if defined(HPA_X86_KERNELS)
    const ProcessorFeatures features = detect_processor();
    if (features.avx2) {
      add("avx2", [](Kernels& kernels) {
        isa_avx2::fill_gram(kernels);
        isa_avx2::fill_inverse_diagonal(kernels);
        isa_avx2::fill_column_scores(kernels);
        isa_avx2::fill_project_merge(kernels);
        isa_avx2::fill_routed_lora(kernels);
        isa_avx2::fill_low_rank(kernels);
      });
    }
    const auto fill_avx512 = [](Kernels& kernels) {
      isa_avx512::fill_gram(kernels);
      isa_avx512::fill_inverse_diagonal(kernels);
      isa_avx512::fill_column_scores(kernels);
      isa_avx512::fill_project_merge(kernels);
      isa_avx512::fill_routed_lora(kernels);
      isa_avx512::fill_low_rank(kernels);
    };
    if (features.avx512) add("avx512", fill_avx512);
    if (features.avx512_bf16) {
      add("avx512_bf16", [&](Kernels& kernels) {
        fill_avx512(kernels);
        isa_avx512_bf16::fill_gram_pairs(kernels);
        isa_avx512_bf16::fill_low_rank_pairs(kernels);
        isa_avx512_bf16::fill_routed_lora_pairs(kernels);
      });
    }
#endif
    chosen = count - 1;
#if defined(HPA_AMX_KERNELS)
    // Not chosen by itself: its kernel has not run on a processor that has AMX (docs/kernels.md).
    if (detect_processor().amx_bf16) {
      const Kernels& fastest = sets[count - 1].kernels;
      add("amx_bf16", [&](Kernels& kernels) {
        kernels = fastest;
        isa_amx_bf16::fill_gram_tiles(kernels);
      });
      sets[count - 1].enable = request_tile_registers;
    }
#endif
  }

  template <typename Fill>
  void add(const char* name, Fill fill) {
    if (count > 0) std::strcat(names, ",");
    std::strcat(names, name);
    sets[count].name = name;
    fill(sets[count].kernels);
    ++count;
  }
};

Available& available() {
  static Available instance;
  return instance;
}

}  // namespace

const Kernels& kernels() {
  const Available& all = available();
  return all.sets[all.chosen.load(std::memory_order_relaxed)].kernels;
}

const char* available_instruction_sets() { return available().names; }

const char* instruction_set() { return available().sets[available().chosen.load()].name; }

Status set_instruction_set(const char* name) {
  if (name == nullptr) return Status::invalid("name: must not be null");
  Available& all = available();
  for (int i = 0; i < all.count; ++i) {
    if (std::strcmp(all.sets[i].name, name) == 0) {
      if (all.sets[i].enable != nullptr && !all.sets[i].enable()) {
        return Status::unavailable("name: the operating system does not give this process the registers it needs");
      }
      all.chosen.store(i);
      return {};
    }
  }
  return Status::unavailable("name: this build or this processor does not have that instruction set");
}

}  // namespace hpa::cpu
