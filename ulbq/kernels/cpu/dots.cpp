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

// One tile of a matrix and the rows from `begin` to `end`, to `result` [end - begin][64]; `wide` has a chunk's weights.
template <int Bits>
void dots_of_tile(const Tiles& w, const Rows& x, int64_t tile, int64_t begin, int64_t end, uint32_t* wide, float* result) {
    const __m512i table = integers<Bits>();
    const int steps = static_cast<int>(w.unit() / 2);
    std::memset(result, 0, (end - begin) * kTile * sizeof(float));
    for (int64_t chunk = 0; chunk < w.chunks(); ++chunk) {
        if (w.parts == 2) {
            widen_planes(w, tile, chunk, wide);
            add_chunk(wide, 0, kPairs, x, chunk, 0, begin, end, Rounded{}, result);
            continue;
        }
        widen_integers<Bits>(w.chunk(tile, chunk, 0), table, wide);
        for (int64_t which = 0; which < x.units; ++which) {
            const int64_t group = w.group_of[chunk * x.units + which];
            Exact finish;
            for (int v = 0; v < kVectors; ++v) {
                finish.scale[v] = w.load_scale(tile, 0, group, v);
                finish.zero[v] = w.load_zero(tile, group, v);
            }
            add_chunk(wide, static_cast<int>(which) * steps, steps, x, chunk, which, begin, end, finish, result);
        }
    }
}

// The matrix of every job with the job's rows.
template <int Bits>
void dots(const Tiles* matrices, const Routes& routes, const uint16_t* x, uint16_t* y, int threads) {
    Rows ordered(routes.places, matrices->columns, matrices->unit());
    const int64_t blocks = (routes.most() + kRows - 1) / kRows, tiles = matrices->tiles();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t place = 0; place < routes.places; ++place) {
            if (routes.owner[place] >= 0) ordered.take_steps(x, routes.input(place), place);
        }
        const Buffer<float> result = buffer<float>(kRows * kTile);
        const Buffer<uint32_t> wide = buffer<uint32_t>(kPairs * kTile);
#pragma omp for schedule(dynamic, 1) collapse(3) nowait
        for (int64_t job = 0; job < routes.count; ++job) {
            for (int64_t block = 0; block < blocks; ++block) {
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const int64_t begin = routes.begin(job) + block * kRows, last = routes.end(job);
                    const int64_t end = begin + kRows < last ? begin + kRows : last;
                    if (begin >= end) continue;
                    dots_of_tile<Bits>(matrices[job], ordered, tile, begin, end, wide.get(), result.get());
                    store_tile(result.get(), routes, begin, end, tile, matrices->outs, y);
                }
            }
        }
    }
}

void dots(const Tiles* matrices, const Routes& routes, const uint16_t* x, uint16_t* y, int threads) {
    switch (matrices->bits) {
        case 1: return dots<1>(matrices, routes, x, y, threads);
        case 2: return dots<2>(matrices, routes, x, y, threads);
        case 3: return dots<3>(matrices, routes, x, y, threads);
        case 4: return dots<4>(matrices, routes, x, y, threads);
    }
}

}  // namespace ulbq

// y [rows][outs] = x [rows][columns] times the matrix, both bfloat16.
extern "C" void ulbq_dots(const uint8_t* codes, int bits, int parts, int64_t outs, int64_t columns, const uint16_t* scales,
                          const uint8_t* zeros, float centre, int64_t group, const uint16_t* x, int64_t rows, uint16_t* y,
                          int threads) {
    const ulbq::Tiles w(codes, bits, parts, outs, columns, scales, zeros, centre, group);
    ulbq::dots(&w, ulbq::Routes(rows), x, y, threads);
}

// y [places][outs]: of matrices of one shape, at the addresses of a table, each with the rows of its jobs (routes.h).
extern "C" void ulbq_dots_each(const int64_t* table, int bits, int parts, int64_t outs, int64_t columns, float centre,
                               int64_t group, const int64_t* jobs, int64_t count, const int64_t* order, int64_t places,
                               int64_t share, const uint16_t* x, uint16_t* y, int threads) {
    const std::vector<ulbq::Tiles> matrices =
        ulbq::of_jobs(table, {nullptr, bits, parts, outs, columns, nullptr, nullptr, centre, group}, jobs, count);
    ulbq::dots(matrices.data(), ulbq::Routes(jobs, count, order, places, share), x, y, threads);
}

#endif
