#include "cpu_features.hpp"

namespace kvkeep {

const char* missing_feature([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::kPortable) return nullptr;
  if (!__builtin_cpu_supports("avx2")) return "avx2";
  if (!__builtin_cpu_supports("fma")) return "fma";
  if (!__builtin_cpu_supports("bmi2")) return "bmi2";
  if (isa == Isa::kAvx2) return nullptr;
  if (!__builtin_cpu_supports("avx512f")) return "avx512f";
  if (!__builtin_cpu_supports("avx512bw")) return "avx512bw";
  if (!__builtin_cpu_supports("avx512vl")) return "avx512vl";
  if (!__builtin_cpu_supports("avx512dq")) return "avx512dq";
  if (!__builtin_cpu_supports("avx512vnni")) return "avx512_vnni";
  if (!__builtin_cpu_supports("avx512bf16")) return "avx512_bf16";
  return nullptr;
#else
  return isa == Isa::kPortable ? nullptr : "x86-64";
#endif
}

}  // namespace kvkeep
