// Products of several bfloat16 rows: codes become bfloat16 once for all of them, then the processor's pair products run.
//
// A chunk of 64 columns is widened at a time into [32 pairs][64 outputs][2 columns], which stays in the first cache while
// every row passes over it. Whatever order the columns of a matrix are widened in, the activations are brought into the
// same: [chunks][rows][64].
#pragma once

#include "tiles.h"

#ifdef __AVX512BF16__

namespace ulbq {

constexpr int kPairs = kChunk / 2;
constexpr int64_t kRows = 64;  // rows that pass over widened codes; what they take stays in the first cache

// Rows of bfloat16 in the order of the matrix, and the sums of their units.
struct Rows {
    Rows(int64_t rows, int64_t columns, int64_t unit)
        : rows(rows), columns(columns), chunks((columns + kChunk - 1) / kChunk), unit(unit), units(kChunk / unit),
          values(buffer<uint16_t>(rows * chunks * kChunk)), sums(buffer<float>(rows * chunks * units)) {}

    // 64 columns of a row, as 32 pairs.
    const uint32_t* pairs(int64_t chunk, int64_t row) const {
        return reinterpret_cast<const uint32_t*>(values.get() + (chunk * rows + row) * kChunk);
    }

    // Row `from` of x, the columns of each step of a tile: the first and third, the second and fourth.
    void take_steps(const uint16_t* x, int64_t from, int64_t row) {
        const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            float total[2];
            for (int64_t half = 0; half < 2; ++half) {
                const int64_t column = chunk * kChunk + 32 * half, left = columns - column;
                const __mmask32 mask = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
                const __m512i some = _mm512_maskz_loadu_epi16(mask, x + from * columns + column);
                const __m512i ordered = _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(some, _MM_PERM_DBCA), _MM_PERM_DBCA);
                _mm512_store_si512(values.get() + (chunk * rows + row) * kChunk + 32 * half, ordered);
                total[half] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)some, ones));
            }
            if (units == 1) total[0] += total[1];
            std::memcpy(sums.get() + (chunk * rows + row) * units, total, units * sizeof(float));
        }
    }

    void take_in_order(const uint16_t* x, int64_t from, int64_t row, const int32_t* order) {
        for (int64_t at = 0; at < chunks * kChunk; ++at) {
            const int64_t chunk = at / kChunk;
            values[(chunk * rows + row) * kChunk + at % kChunk] = at < columns ? x[from * columns + order[at]] : 0;
        }
    }

    const int64_t rows, columns, chunks, unit, units;
    const Buffer<uint16_t> values;
    const Buffer<float> sums;
};

// What becomes of a unit's products before they join the results.
struct Exact {  // integers: scaled, less the zero point
    __m512 scale[kVectors], zero[kVectors];

    __m512 add(__m512 result, __m512 product, int vector, __m512 total) const {
        return _mm512_fmadd_ps(scale[vector], _mm512_fnmadd_ps(zero[vector], total, product), result);
    }
};
struct Rounded {  // weights: nothing
    __m512 add(__m512 result, __m512 product, int, __m512) const { return _mm512_add_ps(result, product); }
};

// Adds the products of `Count` rows with `steps` pairs of columns to `result` [Count][64].
template <int Count, typename Finish>
inline __attribute__((always_inline)) void add_rows(const uint32_t* wide, int steps, const uint32_t* x, const float* totals,
                                                    int64_t total_stride, const Finish& finish, float* result) {
    __m512 sum[Count][kVectors] = {};
    for (int step = 0; step < steps; ++step) {
        __m512bh weight[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) weight[v] = (__m512bh)_mm512_load_si512(wide + step * kTile + 16 * v);
#pragma GCC unroll 8
        for (int row = 0; row < Count; ++row) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[row * kPairs + step]));
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[row][v] = _mm512_dpbf16_ps(sum[row][v], weight[v], pair);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < Count; ++row) {
        const __m512 total = _mm512_set1_ps(totals[row * total_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            float* to = result + row * kTile + 16 * v;
            _mm512_store_ps(to, finish.add(_mm512_load_ps(to), sum[row][v], v, total));
        }
    }
}

// The same for rows `begin` to `end` of a chunk: a unit of it that begins with pair `first`. Six rows fill the registers;
// they are shared out evenly, so that no row goes alone.
template <typename Finish>
void add_chunk(const uint32_t* wide, int first, int steps, const Rows& x, int64_t chunk, int64_t which, int64_t begin,
               int64_t end, const Finish& finish, float* result) {
    wide += first * kTile;
    for (int64_t row = begin; row < end;) {
        const uint32_t* pairs = x.pairs(chunk, row) + first;
        const float* totals = x.sums.get() + (chunk * x.rows + row) * x.units + which;
        float* to = result + (row - begin) * kTile;
        const int64_t left = end - row, turns = (left + 5) / 6, count = (left + turns - 1) / turns;
        switch (count) {
            case 1: add_rows<1>(wide, steps, pairs, totals, x.units, finish, to); break;
            case 2: add_rows<2>(wide, steps, pairs, totals, x.units, finish, to); break;
            case 3: add_rows<3>(wide, steps, pairs, totals, x.units, finish, to); break;
            case 4: add_rows<4>(wide, steps, pairs, totals, x.units, finish, to); break;
            case 5: add_rows<5>(wide, steps, pairs, totals, x.units, finish, to); break;
            case 6: add_rows<6>(wide, steps, pairs, totals, x.units, finish, to); break;
        }
        row += count;
    }
}

// Writes a tile's outputs of the places `begin` to `end`.
inline void store_tile(const float* result, const Routes& routes, int64_t begin, int64_t end, int64_t tile, int64_t outs,
                       uint16_t* y) {
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t out = 0; out < kTile; out += 16) {
            const int64_t at = tile * kTile + out;
            const __m512 value = _mm512_load_ps(result + (row - begin) * kTile + out);
            store_floats(y, kBFloat16, routes.output(row) * outs + at, first(outs - at), value);
        }
    }
}

}  // namespace ulbq

#endif
