// Products with tiles of integer codes.

#include <omp.h>

#include "tiles.h"

namespace ulbq {

// The integer dot products of one tile and `Rows` rows over `Count` columns of a chunk, as floats: in units of factors.
template <int Bits, int Digits, int Rows, int Count>
inline __attribute__((always_inline)) void accumulate(const uint8_t* chunk, const int8_t* const (&digit)[Rows][Digits],
                                                      int first_step, __m512 (&product)[Rows][kVectors]) {
    __m512i sum[Rows][Digits][kVectors];
#pragma GCC unroll 16
    for (int index = 0; index < Count / 4; ++index) {
        const int step = first_step + index;
        __m512i code[kVectors];
#pragma GCC unroll 4
        for (int vector = 0; vector < kVectors; ++vector) code[vector] = unfold<Bits>(chunk, vector, step);
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
            for (int which = 0; which < Digits; ++which) {
                int32_t four;
                std::memcpy(&four, digit[row][which] + 4 * step, 4);
                const __m512i columns = _mm512_set1_epi32(four);
#pragma GCC unroll 4
                for (int vector = 0; vector < kVectors; ++vector) {
                    const __m512i before = index ? sum[row][which][vector] : _mm512_setzero_si512();
                    sum[row][which][vector] = _mm512_dpbusd_epi32(before, code[vector], columns);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
        for (int vector = 0; vector < kVectors; ++vector) {
            const __m512i high = _mm512_slli_epi32(sum[row][Digits - 2][vector], 8);
            product[row][vector] = _mm512_cvtepi32_ps(_mm512_add_epi32(high, sum[row][Digits - 1][vector]));
            if (Digits == 3) {
                const __m512 highest = _mm512_cvtepi32_ps(sum[row][0][vector]);
                product[row][vector] = _mm512_fmadd_ps(highest, _mm512_set1_ps(65536.0f), product[row][vector]);
            }
        }
    }
}

// Adds what one unit of columns contributes to `result` [rows][64].
template <int Bits, int Digits, int Rows, int Count>
inline __attribute__((always_inline)) void add_unit(const Tiles& w, const Activations<Digits>& x, int64_t tile, int part,
                                                    int64_t chunk, int first_step, int64_t row, float* result) {
    const int64_t unit = chunk * kChunk / w.unit() + first_step * 4 / Count;
    const int8_t* digit[Rows][Digits];
    for (int r = 0; r < Rows; ++r) {
        for (int which = 0; which < Digits; ++which) digit[r][which] = x.digit(row + r, which) + chunk * kChunk;
    }
    __m512 product[Rows][kVectors];
    accumulate<Bits, Digits, Rows, Count>(w.chunk(tile, chunk, part), digit, first_step, product);
    const int64_t group = w.group_of[unit];
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
        const __m512 scale = w.load_scale(tile, part, group, vector), zero = w.load_zero(tile, group, vector);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            const __m512 factor = _mm512_set1_ps(x.factors[(row + r) * x.units + unit]);
            const __m512 total = _mm512_set1_ps(x.sums[(row + r) * x.units + unit]);
            float* to = result + (row + r) * kTile + 16 * vector;
            const __m512 centred = _mm512_fnmadd_ps(zero, total, _mm512_mul_ps(product[r][vector], factor));
            _mm512_store_ps(to, _mm512_fmadd_ps(scale, centred, _mm512_load_ps(to)));
        }
    }
}

template <int Bits, int Digits, int Rows>
inline void add_chunk(const Tiles& w, const Activations<Digits>& x, int64_t tile, int64_t chunk, int64_t row, float* result) {
    for (int part = 0; part < w.parts; ++part) {
        if (w.unit() == kChunk) {
            add_unit<Bits, Digits, Rows, 64>(w, x, tile, part, chunk, 0, row, result);
        } else {
            add_unit<Bits, Digits, Rows, 32>(w, x, tile, part, chunk, 0, row, result);
            add_unit<Bits, Digits, Rows, 32>(w, x, tile, part, chunk, 8, row, result);
        }
    }
}

template <int Bits, int Digits>
void multiply(const Tiles& w, const void* x, int type, int64_t rows, void* y, int threads) {
    Activations<Digits> rounded(rows, w.columns, w.unit());
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) rounded.round_row(x, type, row);
        const Buffer<float> result = buffer<float>(rows * kTile);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t tile = 0; tile < w.tiles(); ++tile) {
            std::memset(result.get(), 0, rows * kTile * sizeof(float));
            for (int64_t chunk = 0; chunk < w.chunks(); ++chunk) {
                int64_t row = 0;
                if (Digits == 2) {
                    for (; row + 3 <= rows; row += 3) add_chunk<Bits, Digits, 3>(w, rounded, tile, chunk, row, result.get());
                }
                for (; row + 2 <= rows; row += 2) add_chunk<Bits, Digits, 2>(w, rounded, tile, chunk, row, result.get());
                if (row < rows) add_chunk<Bits, Digits, 1>(w, rounded, tile, chunk, row, result.get());
            }
            for (int64_t row = 0; row < rows; ++row) {
                for (int64_t out = 0; out < kTile; out += 16) {
                    const int64_t at = tile * kTile + out;
                    const __m512 value = _mm512_load_ps(result.get() + row * kTile + out);
                    store_floats(y, type, row * w.outs + at, first(w.outs - at), value);
                }
            }
        }
    }
}

template <int Bits>
void multiply(const Tiles& w, const void* x, int type, int64_t rows, void* y, int threads) {
    if (type == kFloat32) {
        multiply<Bits, 3>(w, x, type, rows, y, threads);
    } else {
        multiply<Bits, 2>(w, x, type, rows, y, threads);
    }
}

// Weights of outputs from `begin` on, transposed: dense [columns][count], count a multiple of 64 but for the last ones.
template <int Bits, int Type>
void widen(const Tiles& w, int64_t begin, int64_t count, void* dense, int threads) {
    const int64_t chunks = w.chunks(), tiles = (count + kTile - 1) / kTile, width = w.unit() / 4;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t index = 0; index < tiles * kVectors; ++index) {
            const int64_t tile = begin / kTile + index / kVectors;
            const int vector = static_cast<int>(index % kVectors);
            const __mmask16 mask = first(count - 16 * index);
            __m512 scale[2] = {}, zero = {};
            for (int step = 0; step < kSteps; ++step) {
                if (step % width == 0) {
                    const int64_t group = w.group_of[(chunk * kSteps + step) / width];
                    for (int part = 0; part < w.parts; ++part) scale[part] = w.load_scale(tile, part, group, vector);
                    zero = w.load_zero(tile, group, vector);
                }
                __m512i code[2] = {};
                for (int part = 0; part < w.parts; ++part) code[part] = unfold<Bits>(w.chunk(tile, chunk, part), vector, step);
                const int64_t column = chunk * kChunk + 4 * step;
                for (int byte = 0; byte < 4 && column + byte < w.columns; ++byte) {
                    __m512 value[2];
                    for (int part = 0; part < w.parts; ++part) {
                        const __m512i one = _mm512_and_si512(_mm512_srli_epi32(code[part], 8 * byte), _mm512_set1_epi32(255));
                        value[part] = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(one), zero), scale[part]);
                    }
                    const __m512 weight = w.parts == 2 ? _mm512_add_ps(value[0], value[1]) : value[0];
                    store_floats(dense, Type, (column + byte) * count + 16 * index, mask, weight);
                }
            }
        }
    }
}

template <int Bits>
void widen(const Tiles& w, int64_t begin, int64_t count, void* dense, int type, int threads) {
    switch (type) {
        case kFloat32: return widen<Bits, kFloat32>(w, begin, count, dense, threads);
        case kBFloat16: return widen<Bits, kBFloat16>(w, begin, count, dense, threads);
        case kFloat16: return widen<Bits, kFloat16>(w, begin, count, dense, threads);
    }
}

}  // namespace ulbq

using ulbq::Tiles;

// y [rows][outs] = x [rows][columns] times the matrix, in the type of x.
extern "C" void ulbq_multiply(const uint8_t* codes, int bits, int parts, int64_t outs, int64_t columns,
                              const uint16_t* scales, const uint8_t* zeros, float centre, int64_t group, const void* x,
                              int type, int64_t rows, void* y, int threads) {
    const Tiles w(codes, bits, parts, outs, columns, scales, zeros, centre, group);
    switch (bits) {
        case 1: return ulbq::multiply<1>(w, x, type, rows, y, threads);
        case 2: return ulbq::multiply<2>(w, x, type, rows, y, threads);
        case 3: return ulbq::multiply<3>(w, x, type, rows, y, threads);
        case 4: return ulbq::multiply<4>(w, x, type, rows, y, threads);
    }
}

// dense [columns][count]: the weights of outputs `begin` to `begin + count`, transposed; `begin` is a multiple of 64.
extern "C" void ulbq_widen(const uint8_t* codes, int bits, int parts, int64_t outs, int64_t columns,
                           const uint16_t* scales, const uint8_t* zeros, float centre, int64_t group, int64_t begin,
                           int64_t count, void* dense, int type, int threads) {
    const Tiles w(codes, bits, parts, outs, columns, scales, zeros, centre, group);
    switch (bits) {
        case 1: return ulbq::widen<1>(w, begin, count, dense, type, threads);
        case 2: return ulbq::widen<2>(w, begin, count, dense, type, threads);
        case 3: return ulbq::widen<3>(w, begin, count, dense, type, threads);
        case 4: return ulbq::widen<4>(w, begin, count, dense, type, threads);
    }
}
