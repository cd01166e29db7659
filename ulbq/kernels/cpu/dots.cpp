// Products of several bfloat16 rows with tiles.
//
// Codes of one part are widened as the integers that they are, exactly, and scaled in float32 behind each unit of columns.
// Two planes with scales of their own are widened to the weights that they make, rounded to bfloat16.

#include <omp.h>

#include "dots.h"

#ifdef __AVX512BF16__

namespace ulbq {

// bfloat16 of 0 to 2^Bits - 1, again and again: an index may have other bits above its own.
template <int Bits>
inline __m512i integers() {
    uint16_t table[32];
    for (int index = 0; index < 32; ++index) {
        const float value = static_cast<float>(index % (1 << Bits));
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        table[index] = static_cast<uint16_t>(bits >> 16);
    }
    return _mm512_loadu_si512(table);
}

// Codes of a step as indices of 16 bits, of which the lowest Bits count: columns 0 and 2, or 1 and 3.
template <int Bits>
inline __m512i halves(const uint8_t* chunk, int vector, int step, int odd) {
    if (Bits == 3) {
        const __m512i bytes = unfold<Bits>(chunk, vector, step);
        return odd ? _mm512_srli_epi16(bytes, 8) : bytes;
    }
    constexpr int kFold = 8 / Bits;
    const __m512i folded = load_bytes(chunk + (step / kFold * kVectors + vector) * 64);
    return _mm512_srli_epi16(folded, step % kFold * Bits + 8 * odd);
}

template <int Bits>
void widen_integers(const uint8_t* chunk, __m512i table, uint32_t* wide) {
#pragma GCC unroll 16
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 4
        for (int vector = 0; vector < kVectors; ++vector) {
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd) {
                const __m512i value = _mm512_permutexvar_epi16(halves<Bits>(chunk, vector, step, odd), table);
                _mm512_store_si512(wide + (2 * step + odd) * kTile + 16 * vector, value);
            }
        }
    }
}

// A value of float32 as bfloat16 in both halves of its lane.
inline __m512i twice(__m512 value) {
    const __m512i half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value));
    return _mm512_or_si512(half, _mm512_slli_epi32(half, 16));
}

// Both planes of a chunk, as the weights that they make together.
inline void widen_planes(const Tiles& w, int64_t tile, int64_t chunk, uint32_t* wide) {
    const int steps = static_cast<int>(w.unit() / 4);
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
        __m512i folded[2][2], one[2] = {}, both = {};
        for (int part = 0; part < 2; ++part) {
            for (int h = 0; h < 2; ++h) folded[part][h] = load_bytes(w.chunk(tile, chunk, part) + (h * kVectors + vector) * 64);
        }
#pragma GCC unroll 16
        for (int step = 0; step < kSteps; ++step) {
            if (step % steps == 0) {
                const int64_t group = w.group_of[(chunk * kSteps + step) / steps];
                const __m512 scale[2] = {w.load_scale(tile, 0, group, vector), w.load_scale(tile, 1, group, vector)};
                for (int part = 0; part < 2; ++part) one[part] = twice(scale[part]);
                both = twice(_mm512_add_ps(scale[0], scale[1]));
            }
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd) {
                const __m512i bit = _mm512_set1_epi16(static_cast<short>(1 << (step % 8 + 8 * odd)));
                const __mmask32 first = _mm512_test_epi16_mask(folded[0][step / 8], bit);
                const __mmask32 second = _mm512_test_epi16_mask(folded[1][step / 8], bit);
                const __m512i without = _mm512_maskz_mov_epi16(first, one[0]);
                const __m512i with = _mm512_mask_mov_epi16(one[1], first, both);
                const __m512i value = _mm512_mask_mov_epi16(without, second, with);
                _mm512_store_si512(wide + (2 * step + odd) * kTile + 16 * vector, value);
            }
        }
    }
}

template <int Bits>
void dots(const Tiles& w, const uint16_t* x, int64_t rows, uint16_t* y, int threads) {
    Rows ordered(rows, w.columns, w.unit());
    const int64_t blocks = (rows + kRows - 1) / kRows;
    const int steps = static_cast<int>(w.unit() / 2);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) ordered.take_steps(x, row);
        const Buffer<float> result = buffer<float>(kRows * kTile);
        const Buffer<uint32_t> wide = buffer<uint32_t>(kPairs * kTile);
        const __m512i table = integers<Bits>();
#pragma omp for schedule(dynamic, 1) collapse(2) nowait
        for (int64_t block = 0; block < blocks; ++block) {
            for (int64_t tile = 0; tile < w.tiles(); ++tile) {
                const int64_t begin = block * kRows, end = begin + kRows < rows ? begin + kRows : rows;
                std::memset(result.get(), 0, (end - begin) * kTile * sizeof(float));
                for (int64_t chunk = 0; chunk < w.chunks(); ++chunk) {
                    if (w.parts == 2) {
                        widen_planes(w, tile, chunk, wide.get());
                        add_chunk(wide.get(), 0, kPairs, ordered, chunk, 0, begin, end, Rounded{}, result.get());
                        continue;
                    }
                    widen_integers<Bits>(w.chunk(tile, chunk, 0), table, wide.get());
                    for (int64_t which = 0; which < ordered.units; ++which) {
                        const int64_t group = w.group_of[chunk * ordered.units + which];
                        Exact finish;
                        for (int v = 0; v < kVectors; ++v) {
                            finish.scale[v] = w.load_scale(tile, 0, group, v);
                            finish.zero[v] = w.load_zero(tile, group, v);
                        }
                        add_chunk(wide.get(), static_cast<int>(which) * steps, steps, ordered, chunk, which, begin, end,
                                  finish, result.get());
                    }
                }
                store_tile(result.get(), begin, end, tile, w.outs, y);
            }
        }
    }
}

}  // namespace ulbq

// y [rows][outs] = x [rows][columns] times the matrix, both bfloat16.
extern "C" void ulbq_dots(const uint8_t* codes, int bits, int parts, int64_t outs, int64_t columns, const uint16_t* scales,
                          const uint8_t* zeros, float centre, int64_t group, const uint16_t* x, int64_t rows, uint16_t* y,
                          int threads) {
    const ulbq::Tiles w(codes, bits, parts, outs, columns, scales, zeros, centre, group);
    switch (bits) {
        case 1: return ulbq::dots<1>(w, x, rows, y, threads);
        case 2: return ulbq::dots<2>(w, x, rows, y, threads);
        case 3: return ulbq::dots<3>(w, x, rows, y, threads);
        case 4: return ulbq::dots<4>(w, x, rows, y, threads);
    }
}

#endif
