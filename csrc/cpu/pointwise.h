// SwiGLU's product and the rotary embedding: one pass over memory each, forward and backward, summed in fp32 and
// rounded once.

MERGE_NORM_INLINE Vf sigmoid(const Vf& x) { return Vf(1.f) / (Vf(1.f) + x.neg().exp()); }

// silu(gate) · up of a row, [gate; up] → [width].
template <Store kStore, typename S>
inline void swiglu_row(const S* gate_up, int64_t width, S* out) {
  for_blocks(width, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS {
    const Block gate = read(gate_up + i, extent), up = read(gate_up + width + i, extent);
    Block product;
    MERGE_NORM_UNROLL for (int j = 0; j < kUnroll; ++j) {
      product.v[j] = gate.v[j] * sigmoid(gate.v[j]) * up.v[j];
    }
    write<kStore>(out + i, product, extent);
  });
}

// The gradient of [gate; up], from the product's.
template <Store kStore, typename S>
inline void swiglu_gradient_row(const S* gate_up, const S* gradient, int64_t width, S* out) {
  for_blocks(width, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS {
    const Block gate = read(gate_up + i, extent), up = read(gate_up + width + i, extent);
    const Block given = read(gradient + i, extent);
    Block for_gate, for_up;
    MERGE_NORM_UNROLL for (int j = 0; j < kUnroll; ++j) {
      const Vf open = sigmoid(gate.v[j]), silu = gate.v[j] * open;
      for_up.v[j] = given.v[j] * silu;
      for_gate.v[j] = given.v[j] * up.v[j] * at::vec::fmadd(silu, Vf(1.f) - open, open);
    }
    write<kStore>(out + i, for_gate, extent);
    write<kStore>(out + width + i, for_up, extent);
  });
}

template <Store kStore, typename S>
void swiglu_rows(const SwigluArgs& a, int64_t begin, int64_t end) {
  const auto* gate_up = static_cast<const S*>(a.gate_up);
  const auto* gradient = static_cast<const S*>(a.gradient);
  auto* out = static_cast<S*>(a.out);
  for (int64_t row = begin; row < end; ++row) {
    const S* both = gate_up + row * 2 * a.width;
    if (gradient) {
      swiglu_gradient_row<kStore>(both, gradient + row * a.width, a.width, out + row * 2 * a.width);
    } else {
      swiglu_row<kStore>(both, a.width, out + row * a.width);
    }
  }
  if (kStore == Store::kStreaming) finish_streaming();
}

template <typename S>
void swiglu(const SwigluArgs& a) {
  const bool stream = may_stream<S>(a.rows * a.width, a.width, {a.out});
  const int64_t grain = std::max<int64_t>(1, kElementsPerPartial / (2 * std::max<int64_t>(1, a.width)));
  at::parallel_for(0, a.rows, grain, [&](int64_t begin, int64_t end) {
    stream ? swiglu_rows<Store::kStreaming, S>(a, begin, end) : swiglu_rows<Store::kCached, S>(a, begin, end);
  });
}

// x · cos + swap(x) · sin, where swap exchanges the halves.
template <typename S>
inline void rotate_row(const S* x, const float* cos, const float* sin, int64_t half, float* as_float, S* out) {
  for_blocks(2 * half, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS { write(as_float + i, read(x + i, extent)); });
  float* turned = as_float + whole_blocks(2 * half);
  for (int64_t i = 0; i < half; ++i) {
    const float low = as_float[i], high = as_float[i + half];
    turned[i] = low * cos[i] + high * sin[i];
    turned[i + half] = high * cos[i + half] + low * sin[i + half];
  }
  for_blocks(2 * half, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS { write(out + i, read(turned + i), extent); });
}

template <typename S>
void rotated_heads_rows(const HeadsArgs& a, int64_t begin, int64_t end) {
  const int64_t K = a.width, padded = whole_blocks(K), all = a.heads[0] + a.heads[1] + a.heads[2];
  std::vector<float> buffers(4 * padded);
  float *cos = buffers.data(), *sin = cos + padded, *work = sin + padded;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.length, t = row % a.length, table = (a.tables_by_sample ? row : t) * K;
    for_blocks(K, [&](int64_t i, auto extent) MERGE_NORM_ALWAYS {
      write(cos + i, read(static_cast<const S*>(a.cos) + table + i, extent));
      write(sin + i, read(static_cast<const S*>(a.sin) + table + i, extent));
    });
    S* out = static_cast<S*>(a.out) + row * all * K;
    for (int part = 0; part < 3; ++part) {
      const int64_t* strides = a.strides[part];
      const S* head = static_cast<const S*>(a.parts[part]) + b * strides[0] + t * strides[2];
      for (int64_t h = 0; h < a.heads[part]; ++h, head += strides[1], out += K) {
        if (part < 2) {
          rotate_row(head, cos, sin, K / 2, work, out);
        } else {
          std::memcpy(out, head, K * sizeof(S));
        }
      }
    }
  }
}

template <typename S>
void rotated_heads(const HeadsArgs& a) {
  const int64_t elements = (a.heads[0] + a.heads[1] + a.heads[2]) * a.width;
  const int64_t grain = std::max<int64_t>(1, kElementsPerPartial / std::max<int64_t>(1, elements));
  at::parallel_for(0, a.batch * a.length, grain,
                   [&](int64_t begin, int64_t end) { rotated_heads_rows<S>(a, begin, end); });
}
