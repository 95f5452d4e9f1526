// Which instruction sets this CPU runs, asked at run time.
#pragma once

namespace kvkeep {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Return the first instruction-set flag `isa` needs and this CPU lacks, or nullptr if it runs.
const char* missing_feature(Isa isa);

}  // namespace kvkeep
