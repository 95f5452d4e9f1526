# Addresses and sizes are trusted here: only kvkeep.ops calls these, after its checks.

from enum import Enum

class Isa(Enum):
    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2

class Dtype(Enum):
    F32 = 0
    BF16 = 1

class Layout(Enum):
    F32 = 0
    BF16 = 1

def missing_feature(isa: Isa) -> str | None: ...

class Backend:
    def __init__(self, isa: Isa, threads: int) -> None: ...
    @property
    def isa(self) -> Isa: ...
    @property
    def threads(self) -> int: ...
    @property
    def calls(self) -> int: ...

def read_all(backend: Backend, data: int, size: int) -> int: ...

class PackedWeight:
    @property
    def nbytes(self) -> int: ...

def pack(
    backend: Backend, dtype: Dtype, int8: bool, weight: int, n: int, k: int, stride: int
) -> PackedWeight: ...
def linear(
    backend: Backend,
    weight: PackedWeight,
    x: int,
    rows: int,
    x_stride: int,
    bias: int,
    out: int,
    out_stride: int,
) -> None: ...
def gated_mlp(
    backend: Backend,
    gate_up: PackedWeight,
    down: PackedWeight,
    x: int,
    rows: int,
    x_stride: int,
    out: int,
    out_stride: int,
) -> None: ...
def rms_norm(
    backend: Backend,
    dtype: Dtype,
    x: int,
    rows: int,
    weight: int,
    out: int,
    dim: int,
    eps: float,
) -> None: ...
def rotate_heads(
    backend: Backend,
    dtype: Dtype,
    x: int,
    rows: int,
    stride: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    cos: int,
    sin: int,
    q_norm: int,
    k_norm: int,
    eps: float,
) -> None: ...

class TurnKind(Enum):
    ORDER = 0
    BUTTERFLY = 1
    MATRIX = 2

def turn_heads(
    backend: Backend,
    dtype: Dtype,
    kind: TurnKind,
    order: int,
    factor: int,
    x: int,
    rows: int,
    row_stride: int,
    head_stride: int,
    heads: int,
    kv_heads: int,
    dim: int,
    out: int,
) -> None: ...
def find_largest(backend: Backend, rows: int, count: int, vocab: int) -> None: ...
def draw(backend: Backend, rows: int, count: int, vocab: int) -> None: ...
def encode(
    isa: Isa,
    dtype: Dtype,
    k: int,
    v: int,
    tiles: int,
    dim: int,
    layout: int,
    first: bool,
    narrowed: float,
    out: int,
    stride: int,
    refused: int,
) -> None: ...
def rows_of_tiles(tiles: int, count: int, dim: int, element: int, k: int, v: int) -> None: ...

class PreparedPlan:
    @property
    def makespan(self) -> float: ...
    @property
    def pieces_beside(self) -> int: ...

def prepare_plan(
    backend: Backend,
    positions: int,
    rows: int,
    order: int,
    groups: int,
    parents: int,
    num_groups: int,
    runs: int,
    num_runs: int,
    pages: int,
    num_pages: int,
    private_tiles: int,
    num_private: int,
    masks: int,
    layout: Layout,
    group: int,
    kv_heads: int,
    dim: int,
    leaves: bool,
) -> PreparedPlan: ...

class Cache:
    def __init__(
        self,
        base: int,
        size: int,
        unit_bytes: int,
        table: int,
        page_slots: int,
        layers: int,
        layer: int,
        kv_heads: int,
        dim: int,
        coded: int,
    ) -> None: ...

class Widen(Enum):
    NO = 0
    FLOATS = 1
    HALVES = 2

class Attention:
    def __init__(self, backend: Backend, widen: Widen) -> None: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def decoded(self) -> int: ...
    def spin(self, layout: Layout, rounds: int) -> int: ...
    @property
    def calls(self) -> int: ...
    def append(
        self,
        layout: Layout,
        cache: Cache,
        k: int,
        k_token: int,
        k_head: int,
        v: int,
        v_token: int,
        v_head: int,
        slots: int,
        count: int,
    ) -> None: ...
    def attend(
        self,
        plan: PreparedPlan,
        cache: Cache,
        q: int,
        q_token: int,
        q_head: int,
        out: int,
        lse2: int,
        scale: float,
        thresholds: int,
        hits: int,
        stamps: int,
        carried: int,
        left: int,
    ) -> None: ...
    def merge(
        self,
        layout: Layout,
        outs: int,
        lse2s: int,
        parts: int,
        rows: int,
        dim: int,
        out: int,
        lse2: int,
    ) -> None: ...
