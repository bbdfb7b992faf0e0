// gram on the tiles of AMX: the kernel's own source, compiled against a model of the tile instructions (amx_model.h),
// so that its logic runs on any processor. It says nothing of time, nor of what real tiles do beyond their
// specification.
//
// This program has the core's dispatch and the kernel linked in once more, and a processor of its own, which has AMX.
#include <string>
#include <vector>

#include "check.h"
#include "cpu/processor.h"
#include "cpu/simd/amx.h"
#include "data.h"
#include "hpa/gram.h"

using namespace hpa;
using namespace hpa::test;

namespace {

bool registers_granted = true;
int registers_asked = 0;

}  // namespace

namespace hpa::cpu {

ProcessorFeatures detect_processor() {
  ProcessorFeatures features;
  features.amx_bf16 = true;
  return features;
}

bool request_tile_registers() {
  ++registers_asked;
  return registers_granted;
}

}  // namespace hpa::cpu

namespace {

void chosen_on_request_only() {
  CHECK(std::string(cpu::available_instruction_sets()) == "portable,amx_bf16", cpu::available_instruction_sets());
  CHECK(std::string(cpu::instruction_set()) == "portable", "not by itself");
  CHECK(registers_asked == 0, "no registers are asked for unasked");
  registers_granted = false;
  CHECK(cpu::set_instruction_set("amx_bf16").code == StatusCode::unavailable, "refused by the operating system");
  CHECK(std::string(cpu::instruction_set()) == "portable" && registers_asked == 1, "the set in use stays");
  registers_granted = true;
  CHECK(cpu::set_instruction_set("amx_bf16").ok(), "");
  CHECK(std::string(cpu::instruction_set()) == "amx_bf16" && registers_asked == 2, "");
}

void compare(std::int64_t tokens, std::int64_t columns, bool masked) {
  const std::string context = std::to_string(tokens) + "x" + std::to_string(columns) + (masked ? " masked" : "");
  Random random(static_cast<unsigned>(tokens * 1000 + columns));
  GuardedMatrix x(tokens, columns, DType::bfloat16), gram(columns, columns, DType::float32);
  x.fill_normal(random);
  std::vector<std::uint8_t> mask(tokens);
  for (std::int64_t t = 0; t < tokens; ++t) {
    mask[t] = random.chance(0.6) ? 1 : 0;
    if (masked && mask[t] == 0) {
      for (std::int64_t j = 0; j < columns; ++j) x.set(t, j, j % 2 == 0 ? NAN : INFINITY);
    }
  }
  for (std::int64_t i = 0; i < columns; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) gram.set(i, j, 1.0 / (1 + i + j));
  }
  const int products_before = amx_model::products;
  const Matrix view = gram.mutable_view();
  CHECK(cpu::gram_accumulate(x.view(), masked ? mask.data() : nullptr, static_cast<float*>(view.data), view.row_stride)
            .ok(),
        context);
  CHECK(gram.guards_intact(), context);
  CHECK(amx_model::products > products_before || tokens == 0, context + " ran on tiles");
  CHECK(amx_model::configured == amx_model::released, context + " every configuration is given back");
  for (std::int64_t i = 0; i < columns; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      double expected = static_cast<float>(1.0 / (1 + i + j)), bound = 1;
      for (std::int64_t t = 0; t < tokens; ++t) {
        if (masked && mask[t] == 0) continue;
        expected += x.at(t, i) * x.at(t, j);
        bound += std::abs(x.at(t, i) * x.at(t, j));
      }
      CHECK(std::abs(gram.at(i, j) - expected) <= 2e-6 * bound, context);
      CHECK(gram.bits(i, j) == gram.bits(j, i), context + " symmetric");
    }
  }
}

// Many tiles, packing tasks and threads; small integers, so that every sum is exact.
void exact_sums(std::int64_t tokens, std::int64_t columns) {
  const auto value = [](std::int64_t t, std::int64_t j) {
    return static_cast<int>((t * 7 + j * 3 + t * j % 11) % 5) - 2;
  };
  GuardedMatrix x(tokens, columns, DType::bfloat16);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t j = 0; j < columns; ++j) x.set(t, j, value(t, j));
  }
  std::vector<float> gram(columns * columns);
  CHECK(cpu::gram_accumulate(x.view(), nullptr, gram.data(), columns).ok(), "");
  for (std::int64_t i = 0; i < columns; i += 13) {
    for (std::int64_t j = 0; j < columns; j += 7) {
      std::int64_t sum = 0;
      for (std::int64_t t = 0; t < tokens; ++t) sum += value(t, i) * value(t, j);
      CHECK(gram[i * columns + j] == static_cast<float>(sum), std::to_string(i) + "," + std::to_string(j));
    }
  }
}

}  // namespace

int main() {
  cpu::set_thread_count(1);  // the model counts without locks
  chosen_on_request_only();
  for (const std::int64_t columns : {1, 15, 17, 48, 65, 130}) {
    for (const std::int64_t tokens : {0, 1, 2, 31, 32, 33, 130, 517}) {
      compare(tokens, columns, (tokens + columns) % 3 == 0);
    }
  }
  exact_sums(333, 1200);
  CHECK(amx_model::faults == 0, std::to_string(amx_model::faults));
  return report("gram on AMX tiles");
}
