// What stands between the products of a decoder block, for training: norms, rotations, gates, forward and back.
//
// Torch makes each of several operations, which all wait for memory. Here values are read once, and written once in
// the type that the next product takes. Sums over rows are added up chunk by chunk: the same for any number of threads.

#include <omp.h>

#include <vector>

#include "vectors.h"

namespace ulbq {

constexpr int64_t kRows = 32;  // whose gradients of the weight are added up together

inline float norm_factor(const float* x, int64_t width, float epsilon) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < width; at += 16) {
        const __m512 value = load(x + at, first(width - at));
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    return 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / static_cast<float>(width) + epsilon);
}

// A gradient that came in two types, either of which may be missing.
struct Incoming {
    const float* whole;
    const uint16_t* half;

    __m512 load(int64_t at, __mmask16 mask) const {
        const __m512 one = whole ? _mm512_maskz_loadu_ps(mask, whole + at) : _mm512_setzero_ps();
        return half ? _mm512_add_ps(one, load_floats(half, kBFloat16, at, mask)) : one;
    }
};

// One row of a root mean square norm back: `to` and `to_weight` may be null.
inline void norm_back(const float* x, const float* weight, float factor, int64_t width, const Incoming& incoming,
                      int64_t begin, float* to, float* to_weight) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < width; at += 16) {
        const __mmask16 mask = first(width - at);
        const __m512 product = _mm512_mul_ps(incoming.load(begin + at, mask), load(x + at, mask));
        if (to_weight) {
            const __m512 so_far = load(to_weight + at, mask);
            _mm512_mask_storeu_ps(to_weight + at, mask, _mm512_fmadd_ps(product, all(factor), so_far));
        }
        sum = _mm512_fmadd_ps(product, load(weight + at, mask), sum);
    }
    if (!to) return;
    const __m512 pull = all(_mm512_reduce_add_ps(sum) * factor * factor * factor / static_cast<float>(width));
    for (int64_t at = 0; at < width; at += 16) {
        const __mmask16 mask = first(width - at);
        const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(incoming.load(begin + at, mask), load(weight + at, mask)), all(factor));
        _mm512_mask_storeu_ps(to + at, mask, _mm512_fnmadd_ps(load(x + at, mask), pull, scaled));
    }
}

// Where a head of a token begins, in elements.
struct Places {
    int64_t batch, head, token;
    int64_t operator()(int64_t b, int64_t h, int64_t t) const { return b * batch + h * head + t * token; }
};

template <int From, int To>
inline void rotate(const void* x, int64_t from, const float* cosine, const float* sine, int64_t width, bool back, void* y,
                   int64_t to) {
    const int64_t half = width / 2;
    const __m512 sign = all(back ? -1.0f : 1.0f);
    for (int64_t at = 0; at < half; at += 16) {
        const __mmask16 mask = first(half - at);
        const __m512 low = load_floats(x, From, from + at, mask), high = load_floats(x, From, from + half + at, mask);
        const __m512 low_sine = load(sine + at, mask), high_sine = load(sine + half + at, mask);
        // On the way back each half takes the sine that its partner had.
        const __m512 to_low = times(sign, times(high, back ? high_sine : low_sine));
        const __m512 to_high = times(sign, times(low, back ? low_sine : high_sine));
        store_rounded(y, To, to + at, mask, minus(times(low, load(cosine + at, mask)), to_low));
        store_rounded(y, To, to + half + at, mask, plus(times(high, load(cosine + half + at, mask)), to_high));
    }
}

inline __m512 sigmoid(__m512 x) {
    return inverse(_mm512_add_ps(all(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

}  // namespace ulbq

using namespace ulbq;

// y = weight * x / rms(x) of float32 [rows][width], as float32, as bfloat16 or both; `factors` [rows] is 1 / rms(x).
extern "C" void ulbq_norm(const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* whole,
                          uint16_t* half, float* factors, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float factor = factors[row] = norm_factor(x + row * width, width, epsilon);
        for (int64_t at = 0; at < width; at += 16) {
            const __mmask16 mask = first(width - at);
            const __m512 value = times(load(weight + at, mask), times(load(x + row * width + at, mask), all(factor)));
            if (whole) _mm512_mask_storeu_ps(whole + row * width + at, mask, value);
            if (half) store_rounded(half, kBFloat16, row * width + at, mask, value);
        }
    }
}

// The gradient is the sum of `whole` and `half`; `to` [rows][width] and `to_weight` [width] may be null.
extern "C" void ulbq_norm_back(const float* x, const float* weight, const float* factors, int64_t rows, int64_t width,
                               const float* whole, const uint16_t* half, float* to, float* to_weight, int threads) {
    const int64_t chunks = (rows + kRows - 1) / kRows;
    std::vector<float> sums(to_weight ? chunks * width : 0);
    const Incoming incoming{whole, half};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t row = chunk * kRows; row < rows && row < (chunk + 1) * kRows; ++row) {
            const int64_t at = row * width;
            norm_back(x + at, weight, factors[row], width, incoming, at, to ? to + at : nullptr,
                      to_weight ? sums.data() + chunk * width : nullptr);
        }
    }
    for (int64_t at = 0; to_weight && at < width; ++at) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * width + at];
        to_weight[at] = static_cast<float>(sum);
    }
}

// Rotary positions: x and y [batch][heads][tokens][width] with places of their own, cosines and sines float32
// [tokens][width] with `stride` between samples. `back` turns gradients the other way.
extern "C" void ulbq_rotary(const void* x, int from, int64_t x_batch, int64_t x_head, int64_t x_token, const float* cosine,
                            const float* sine, int64_t stride, int64_t batch, int64_t heads, int64_t tokens,
                            int64_t width, int back, void* y, int to, int64_t y_batch, int64_t y_head, int64_t y_token,
                            int threads) {
    const Places source{x_batch, x_head, x_token}, target{y_batch, y_head, y_token};
    by_type(from, [&](auto source_type) {
        by_type(to, [&](auto target_type) {
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
            for (int64_t b = 0; b < batch; ++b) {
                for (int64_t t = 0; t < tokens; ++t) {
                    const int64_t angle = b * stride + t * width;
                    for (int64_t h = 0; h < heads; ++h) {
                        rotate<decltype(source_type)::value, decltype(target_type)::value>(
                            x, source(b, h, t), cosine + angle, sine + angle, width, back, y, target(b, h, t));
                    }
                }
            }
        });
    });
}

// y = silu(gate) * up, all of one type.
extern "C" void ulbq_gate(const void* gate, const void* up, int64_t count, void* y, int type, int threads) {
    by_type(type, [&](auto float_type) {
        constexpr int kType = decltype(float_type)::value;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t at = 0; at < count; at += 16) {
            const __mmask16 mask = first(count - at);
            const __m512 value = load_floats(gate, kType, at, mask), factor = load_floats(up, kType, at, mask);
            store_rounded(y, kType, at, mask, _mm512_mul_ps(_mm512_mul_ps(value, sigmoid(value)), factor));
        }
    });
}

extern "C" void ulbq_gate_back(const void* gate, const void* up, const void* gradients, int64_t count, void* to_gate,
                               void* to_up, int type, int threads) {
    by_type(type, [&](auto float_type) {
        constexpr int kType = decltype(float_type)::value;
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t at = 0; at < count; at += 16) {
            const __mmask16 mask = first(count - at);
            const __m512 value = load_floats(gate, kType, at, mask), factor = load_floats(up, kType, at, mask);
            const __m512 incoming = load_floats(gradients, kType, at, mask), share = sigmoid(value);
            store_rounded(to_up, kType, at, mask, _mm512_mul_ps(incoming, _mm512_mul_ps(value, share)));
            // d silu(x) / dx = s (1 + x (1 - s))
            const __m512 slope = _mm512_fmadd_ps(value, _mm512_sub_ps(all(1.0f), share), all(1.0f));
            store_rounded(to_gate, kType, at, mask, _mm512_mul_ps(_mm512_mul_ps(incoming, factor), _mm512_mul_ps(share, slope)));
        }
    });
}
