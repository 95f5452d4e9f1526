// Memory and arithmetic at the same time: pieces of few rows are attended between the steps of an
// item of many.

// Attends the pieces beside an item, between its steps: their tokens are fetched while the item's
// many rows are multiplied.
template <class K>
class Between {
 public:
  Between(const Job& job, const Item& item, Beside beside, char* scratch)
      : job_(job),
        beside_(beside),
        steps_((item.end - item.begin + kStep - 1) / kStep),
        blocks_(4 * ((item.row_end - item.row_begin + Isa::kRows - 1) / Isa::kRows)),
        panel_(scratch, job.cache.dim, kPanel) {
    for (int i = 0; i < beside.count; i++) chunks_ += chunks_of(beside.pieces[i]);
    position_ = beside.pieces[0].begin;
    look_ahead();
  }

  // Fetch a share of what the next step's end is for.
  void block() {
    for (int i = 0; i < share_ && tile_ < tiles_; i++) {
      __builtin_prefetch(ahead_[tile_].tile + offset_, 0, 2);
      offset_ += 64;
      if (offset_ < ahead_[tile_].bytes) continue;
      offset_ = 0;
      tile_++;
    }
  }

  void step() {
    taken_++;
    while (done_ < due(taken_)) attend_chunk();
    look_ahead();
  }

  // Attend what is left; return the bytes of K and V read.
  uint64_t finish() {
    while (done_ < chunks_) attend_chunk();
    return bytes_;
  }

 private:
  static constexpr int kChunk = 2 * kStep;
  static constexpr int kAhead = 3 * kChunk / kPage;  // tiles: more would not stay in the caches

  static int chunks_of(const Item& piece) {
    return (piece.end - piece.begin + kChunk - 1) / kChunk;
  }

  int64_t due(int64_t steps) const { return steps < steps_ ? chunks_ * steps / steps_ : chunks_; }

  void look_ahead() {
    tiles_ = tile_ = 0;
    offset_ = 0;
    const int dim = job_.cache.dim;
    int index = index_, position = position_;
    for (int64_t chunk = done_; chunk < due(taken_ + 1) && tiles_ + 2 <= kAhead; chunk++) {
      const Item& piece = beside_.pieces[index];
      int run = piece.run_begin;
      const int to = position + kChunk < piece.end ? position + kChunk : piece.end;
      for (; position < to && tiles_ + 2 <= kAhead; position += kStep) {
        Step step;
        const int last = piece.end - 1;
        if (!find_step(job_, piece, last, -1, position, run, step)) continue;
        for (int j = 0; j < 2; j++) {
          if (step.tile[j]) ahead_[tiles_++] = {step.tile[j], tile_bytes(step.layout, dim)};
        }
      }
      if (to == piece.end && ++index < beside_.count) position = beside_.pieces[index].begin;
    }
    int64_t lines = 0;
    for (int i = 0; i < tiles_; i++) lines += ahead_[i].bytes / 64;
    share_ = static_cast<int>((lines + blocks_ - 1) / blocks_);
  }

  void attend_chunk() {
    const Item& piece = beside_.pieces[index_];
    const int rows = piece.row_end - piece.row_begin;
    const State state = State::at(job_.states + piece.states, rows);
    if (position_ == piece.begin) {
      panel_.rows = 0;
      for (int row = piece.row_begin; row < piece.row_end; row++) panel_.push(job_, piece, row);
      state.clear(rows, job_.cache.dim);
    }
    const int to = position_ + kChunk < piece.end ? position_ + kChunk : piece.end;
    Alone alone;
    bytes_ += walk(job_, piece, panel_, position_, to, state, alone);
    position_ = to;
    done_++;
    if (to == piece.end && ++index_ < beside_.count) position_ = beside_.pieces[index_].begin;
  }

  const Job& job_;
  const Beside beside_;
  const int64_t steps_;
  const int blocks_;  // of a step
  Panel<K> panel_;
  int64_t chunks_ = 0, done_ = 0, taken_ = 0;
  int index_ = 0, position_ = 0;
  struct Tile {
    const char* tile;
    int64_t bytes;
  };
  Tile ahead_[kAhead];
  int tiles_ = 0, tile_ = 0, share_ = 0;  // share_: lines a block
  int64_t offset_ = 0;
  uint64_t bytes_ = 0;
};
