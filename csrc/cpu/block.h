// A block: the unit of work of the CPU kernels, kUnroll vectors of fp32, read from and written to any storage type.
//
// Included once per instruction set, inside its namespace (see kernels.inl).

// Blocks must stay in registers, which a call would empty.
#define MERGE_NORM_ALWAYS __attribute__((always_inline))
#define MERGE_NORM_INLINE inline MERGE_NORM_ALWAYS
#define MERGE_NORM_UNROLL _Pragma("GCC unroll 8")

using Vf = at::vec::Vectorized<float>;

constexpr int64_t kWidth = Vf::size();
constexpr int kUnroll = kWidth == 16 ? 8 : 4;  // AVX-512 has 32 registers, older ones 16
constexpr int64_t kBlock = kUnroll * kWidth;

struct Block {
  Vf v[kUnroll];
};

// How much of a block there is: all of it, or the end of a row.
struct Whole {};
struct Part {
  int64_t count;
};

// Calls body(i, extent) for every block of `count` elements; i is where it starts.
template <typename Body>
MERGE_NORM_INLINE void for_blocks(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) body(i, Whole{});
  if (i < count) body(i, Part{count - i});
}

MERGE_NORM_INLINE int64_t whole_blocks(int64_t count) { return (count + kBlock - 1) / kBlock * kBlock; }

// ------------------------------------------------------------------------------------------- in and out

using Bf16s = at::vec::Vectorized<c10::BFloat16>;
using Halfs = at::vec::Vectorized<c10::Half>;

#if defined(CPU_CAPABILITY_AVX512)
// at::vec takes two and seven instructions a vector for what one and five can do: a bf16 is the upper half of an
// fp32, so one permutation of 16-bit words widens, and one of two registers narrows what was rounded in place.
MERGE_NORM_INLINE __m512i word_order(int first) {  // first, first + 1, … in the upper halves of the lanes
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(first)), 16);
}

MERGE_NORM_INLINE std::tuple<Vf, Vf> widen(const Bf16s& packed) {
  const __m512i words = packed;
  const __mmask32 upper = 0xAAAAAAAA;
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(upper, word_order(0), words)),
          _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(upper, word_order(16), words))};
}

// Nearest bf16, ties to even, in the upper half of each lane. A NaN is left as it is: arithmetic made it, so it is
// quiet and its upper half a NaN too.
MERGE_NORM_INLINE __m512i round_to_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __mmask16 number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
  const __mmask16 odd = _mm512_mask_test_epi32_mask(number, bits, _mm512_set1_epi32(0x10000));
  const __m512i raised = _mm512_mask_add_epi32(bits, number, bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_sub_epi32(raised, odd, raised, _mm512_set1_epi32(-1));
}

MERGE_NORM_INLINE void narrow(const Vf& low, const Vf& high, Bf16s& packed) {
  const __m512i first = _mm512_set_epi32(  // words 1, 3, 5, … of both
      0x3f003d, 0x3b0039, 0x370035, 0x330031, 0x2f002d, 0x2b0029, 0x270025, 0x230021, 0x1f001d, 0x1b0019, 0x170015,
      0x130011, 0x0f000d, 0x0b0009, 0x070005, 0x030001);
  packed = Bf16s(_mm512_permutex2var_epi16(round_to_bf16(low), first, round_to_bf16(high)));
}
#else
MERGE_NORM_INLINE std::tuple<Vf, Vf> widen(const Bf16s& packed) { return at::vec::convert_bfloat16_float(packed); }
MERGE_NORM_INLINE void narrow(const Vf& low, const Vf& high, Bf16s& packed) {
  packed = at::vec::convert_float_bfloat16(low, high);
}
#endif
MERGE_NORM_INLINE std::tuple<Vf, Vf> widen(const Halfs& packed) { return at::vec::convert_half_float(packed); }
MERGE_NORM_INLINE void narrow(const Vf& low, const Vf& high, Halfs& packed) {
  packed = at::vec::convert_float_half(low, high);
}

MERGE_NORM_INLINE Block zeros() {
  Block b;
  MERGE_NORM_UNROLL for (int i = 0; i < kUnroll; ++i) b.v[i] = Vf(0.f);
  return b;
}

template <typename S>
MERGE_NORM_INLINE Block read(const S* p, Whole = {}) {
  Block b;
  if constexpr (std::is_same_v<S, float>) {
    MERGE_NORM_UNROLL for (int i = 0; i < kUnroll; ++i) b.v[i] = Vf::loadu(p + i * kWidth);
  } else {
    MERGE_NORM_UNROLL for (int i = 0; i < kUnroll; i += 2) {
      std::tie(b.v[i], b.v[i + 1]) = widen(at::vec::Vectorized<S>::loadu(p + i * kWidth));
    }
  }
  return b;
}

// Behind the end of a row there are zeros.
template <typename S>
MERGE_NORM_INLINE Block read(const S* p, Part part) {
  alignas(64) S padded[kBlock] = {};
  std::memcpy(padded, p, part.count * sizeof(S));
  return read(padded);
}

// Plain stores leave the written lines in the cache; streaming ones go past it and spare the read of what is
// about to be overwritten, a third of a store's traffic, where the result would not stay cached anyway.
enum class Store { kCached, kStreaming };

template <Store kStore>
MERGE_NORM_INLINE void write_vector(void* p, const void* vector) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kStore == Store::kStreaming) {
    _mm512_stream_si512(static_cast<__m512i*>(p), *static_cast<const __m512i*>(vector));
    return;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (kStore == Store::kStreaming) {
    _mm256_stream_si256(static_cast<__m256i*>(p), *static_cast<const __m256i*>(vector));
    return;
  }
#endif
  std::memcpy(p, vector, sizeof(Vf));
}

// Rounds a block to S, writes it, and returns what was written.
template <Store kStore = Store::kCached, typename S>
MERGE_NORM_INLINE Block write(S* p, const Block& b, Whole = {}) {
  if constexpr (std::is_same_v<S, float>) {
    MERGE_NORM_UNROLL for (int i = 0; i < kUnroll; ++i) write_vector<kStore>(p + i * kWidth, &b.v[i]);
    return b;
  } else {
    Block rounded;
    MERGE_NORM_UNROLL for (int i = 0; i < kUnroll; i += 2) {
      at::vec::Vectorized<S> packed;
      narrow(b.v[i], b.v[i + 1], packed);
      write_vector<kStore>(p + i * kWidth, &packed);
      std::tie(rounded.v[i], rounded.v[i + 1]) = widen(packed);
    }
    return rounded;
  }
}

template <Store kStore = Store::kCached, typename S>
MERGE_NORM_INLINE Block write(S* p, const Block& b, Part part) {
  alignas(64) S padded[kBlock];
  const Block rounded = write(padded, b);
  std::memcpy(p, padded, part.count * sizeof(S));
  return rounded;
}

// ------------------------------------------------------------------------------------------- arithmetic

// total += a · b, element by element.
MERGE_NORM_INLINE void multiply_add(Block& total, const Block& a, const Block& b) {
  MERGE_NORM_UNROLL for (int i = 0; i < kUnroll; ++i) total.v[i] = at::vec::fmadd(a.v[i], b.v[i], total.v[i]);
}

MERGE_NORM_INLINE void multiply_add(Block& total, float a, const Block& b) {
  const Vf scale(a);
  MERGE_NORM_UNROLL for (int i = 0; i < kUnroll; ++i) total.v[i] = at::vec::fmadd(scale, b.v[i], total.v[i]);
}

MERGE_NORM_INLINE Block multiply(const Block& a, const Block& b) {
  Block product;
  MERGE_NORM_UNROLL for (int i = 0; i < kUnroll; ++i) product.v[i] = a.v[i] * b.v[i];
  return product;
}

MERGE_NORM_INLINE Block multiply(float a, const Block& b) {
  Block product;
  const Vf scale(a);
  MERGE_NORM_UNROLL for (int i = 0; i < kUnroll; ++i) product.v[i] = scale * b.v[i];
  return product;
}

inline float sum(const Vf& vector) {
  alignas(64) float lanes[kWidth];
  vector.store(lanes);
  float total = 0.f;
  for (float lane : lanes) total += lane;
  return total;
}

MERGE_NORM_INLINE float sum(const Block& b) {
  Vf total = b.v[0];
  MERGE_NORM_UNROLL for (int i = 1; i < kUnroll; ++i) total = total + b.v[i];
  return sum(total);
}

// A running inner product: two vectors, so that additions need not wait for one another.
struct Dot {
  Vf even{0.f}, odd{0.f};

  MERGE_NORM_INLINE void add(const Block& a, const Block& b) {
    MERGE_NORM_UNROLL for (int i = 0; i < kUnroll; i += 2) {
      even = at::vec::fmadd(a.v[i], b.v[i], even);
      odd = at::vec::fmadd(a.v[i + 1], b.v[i + 1], odd);
    }
  }

  MERGE_NORM_INLINE void add(const Dot& other) {
    even = even + other.even;
    odd = odd + other.odd;
  }

  float value() const { return sum(even + odd); }
};
