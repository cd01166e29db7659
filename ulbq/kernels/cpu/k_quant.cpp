// Products with scales in two levels, read as they are stored: formats/k_quant.py says how they lie.
//
// Codes are not decoded: each bit plane picks inputs, which count 1, 2, 4 or 8. Nothing is rounded but in float32.
#include <omp.h>

#include "linear.h"

namespace ulbq {

constexpr int64_t kSuper = 256;  // columns that share the scale of scales

struct KQuant {
    const uint8_t* codes;       // [bits][outs][columns / 8]
    int64_t outs, columns;
    const uint16_t* scales;     // [outs][columns / 256]
    const uint8_t* sub_scales;  // planes of [outs][groups]
    const uint16_t* minima;     // both null at 3 bits
    const uint8_t* sub_minima;

    int64_t supers() const { return columns / kSuper; }
};

template <int Bits>
constexpr int kColumns = Bits == 4 ? 32 : 16;  // of a group
template <int Bits>
constexpr int kGroups = kSuper / kColumns<Bits>;  // of a super-block
template <int Bits>
constexpr int kSubBits = Bits == 2 ? 4 : 6;

// The whole numbers of the groups of super-block `at`, zeros behind them.
template <int Bits>
inline __m512 numbers(const uint8_t* planes, const KQuant& w, int64_t at) {
    const int64_t plane = w.outs * w.supers() * kGroups<Bits> / 8;
    __m512i sum = _mm512_setzero_si512();
    for (int bit = 0; bit < kSubBits<Bits>; ++bit) {
        uint16_t mask = 0;
        std::memcpy(&mask, planes + bit * plane + at * kGroups<Bits> / 8, kGroups<Bits> / 8);
        sum = _mm512_mask_add_epi32(sum, mask, sum, _mm512_set1_epi32(1 << bit));
    }
    return _mm512_cvtepi32_ps(sum);
}

// Sums of the groups of a super-block of inputs: 16, zeros behind eight.
template <int Bits>
inline void sum_groups(const float* x, float* sums) {
    for (int group = 0; group < 16; ++group) {
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; group < kGroups<Bits> && i < kColumns<Bits>; i += 16) {
            sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + group * kColumns<Bits> + i));
        }
        sums[group] = _mm512_reduce_add_ps(sum);
    }
}

// One output of rows x [Rows][columns], whose groups sum to sums [Rows][supers][16].
template <int Bits, int Rows>
inline void dot(const KQuant& w, int64_t out, const float* x, const float* sums, float* y, int64_t stride) {
    const uint8_t* codes = w.codes + out * w.columns / 8;
    const int64_t plane = w.outs * w.columns / 8;
    __m512 total[Rows] = {};
    for (int64_t super = 0; super < w.supers(); ++super) {
        const int64_t at = out * w.supers() + super;
        __m512 scale = numbers<Bits>(w.sub_scales, w, at);
        if (Bits == 3) scale = _mm512_sub_ps(scale, all(32.0f));
        scale = _mm512_mul_ps(scale, all(_cvtsh_ss(w.scales[at])));
        const __m512 offset = Bits == 3 ? _mm512_mul_ps(scale, all(4.0f))
                                        : _mm512_mul_ps(numbers<Bits>(w.sub_minima, w, at), all(_cvtsh_ss(w.minima[at])));
        alignas(64) float scales[16];
        _mm512_store_ps(scales, scale);
        for (int row = 0; row < Rows; ++row) {
            total[row] = _mm512_fnmadd_ps(offset, _mm512_loadu_ps(sums + (row * w.supers() + super) * 16), total[row]);
        }
        for (int group = 0; group < kGroups<Bits>; ++group) {
            __m512 sum[Rows] = {};
            for (int i = 0; i < kColumns<Bits>; i += 16) {
                const int64_t from = super * kSuper + group * kColumns<Bits> + i;
                __mmask16 picked[Bits];
                for (int bit = 0; bit < Bits; ++bit) std::memcpy(&picked[bit], codes + bit * plane + from / 8, 2);
                for (int row = 0; row < Rows; ++row) {
                    __m512 value = _mm512_loadu_ps(x + row * w.columns + from);
                    for (int bit = 0; bit < Bits; ++bit) {
                        sum[row] = _mm512_mask_add_ps(sum[row], picked[bit], sum[row], value);
                        value = _mm512_add_ps(value, value);
                    }
                }
            }
            for (int row = 0; row < Rows; ++row) total[row] = _mm512_fmadd_ps(sum[row], all(scales[group]), total[row]);
        }
    }
    for (int row = 0; row < Rows; ++row) y[row * stride] = _mm512_reduce_add_ps(total[row]);
}

template <int Bits>
void multiply(const KQuant& w, const float* x, int64_t rows, float* y, int threads) {
    const Buffer<float> sums = buffer<float>(rows * w.supers() * 16);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t at = 0; at < rows * w.supers(); ++at) sum_groups<Bits>(x + at * kSuper, sums.get() + at * 16);
#pragma omp for schedule(static)
        for (int64_t out = 0; out < w.outs; ++out) {
            int64_t row = 0;
            const auto run = [&](auto count) {
                for (; row + count <= rows; row += count) {
                    dot<Bits, decltype(count)::value>(w, out, x + row * w.columns, sums.get() + row * w.supers() * 16,
                                                      y + row * w.outs + out, w.outs);
                }
            };
            run(std::integral_constant<int, 4>());
            run(std::integral_constant<int, 1>());
        }
    }
}

// Super-blocks and one row.
template <int Bits>
struct KQuantLinear : Linear {
    KQuantLinear(const KQuant& w, const float* bias) : Linear(w.outs, w.columns, bias), w(w) {}

    int64_t scratch() const override { return w.supers() * 16; }

    void multiply(const float* x, float* y, Own&, float* sums) const override {
#pragma omp for schedule(static)
        for (int64_t super = 0; super < w.supers(); ++super) sum_groups<Bits>(x + super * kSuper, sums + super * 16);
#pragma omp for schedule(static) nowait
        for (int64_t begin = 0; begin < outs; begin += 16) {
            alignas(64) float found[16];
            for (int64_t out = begin; out < outs && out < begin + 16; ++out) dot<Bits, 1>(w, out, x, sums, found + out - begin, 1);
            put(y, begin, _mm512_load_ps(found));
        }
    }

  private:
    const KQuant w;
};

// `run` with the bits as a constant.
template <class Run>
inline void by_bits(int bits, const Run& run) {
    if (bits == 2) return run(std::integral_constant<int, 2>());
    if (bits == 3) return run(std::integral_constant<int, 3>());
    run(std::integral_constant<int, 4>());
}

}  // namespace ulbq

using namespace ulbq;

// y [rows][outs] = x [rows][columns] times the matrix.
extern "C" void ulbq_multiply_k_quant(int bits, int64_t outs, int64_t columns, const uint8_t* codes,
                                      const uint16_t* scales, const uint8_t* sub_scales, const uint16_t* minima,
                                      const uint8_t* sub_minima, const float* x, int64_t rows, float* y, int threads) {
    const KQuant w{codes, outs, columns, scales, sub_scales, minima, sub_minima};
    by_bits(bits, [&](auto count) { ulbq::multiply<decltype(count)::value>(w, x, rows, y, threads); });
}

// A matrix for ulbq_decode.
extern "C" void ulbq_k_quant_linear(int bits, int64_t outs, int64_t columns, const uint8_t* codes,
                                    const uint16_t* scales, const uint8_t* sub_scales, const uint16_t* minima,
                                    const uint8_t* sub_minima, const float* bias, const Linear** made) {
    const KQuant w{codes, outs, columns, scales, sub_scales, minima, sub_minima};
    by_bits(bits, [&](auto count) { *made = new KQuantLinear<decltype(count)::value>(w, bias); });
}
