// One row of activations as tables: what columns add to a sum for each of the sixteen codes that four bits make.
//
// A permutation of bytes looks up sixteen outputs times four bytes of a lane at a time, and a dot product with ones adds the
// four. Entries have 16 bits, in two digits. All sums over 64 columns are exact.
#pragma once

#include "tiles.h"

#ifdef __AVX512VBMI__

namespace ulbq {

constexpr int64_t kTable = 128;  // bytes: [2 digits, the lower first][4 bytes of a lane][16 codes]

// A table of two vectors of 16 bits: the entries of bytes 0 and 1, and of 2 and 3.
inline void store_table(__m512i front, __m512i back, uint8_t* to) {
    alignas(64) static const uint8_t kEven[64] = {
        0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36,  38,  40,  42,  44,  46,  48,  50,  52,  54,  56,  58,  60,  62,
        64, 66, 68, 70, 72, 74, 76, 78, 80, 82, 84, 86, 88, 90, 92, 94, 96, 98, 100, 102, 104, 106, 108, 110, 112, 114, 116, 118, 120, 122, 124, 126};
    const __m512i even = _mm512_load_si512(kEven);
    _mm512_store_si512(to, _mm512_permutex2var_epi8(front, even, back));
    _mm512_store_si512(to + 64, _mm512_permutex2var_epi8(_mm512_srli_epi16(front, 8), even, _mm512_srli_epi16(back, 8)));
}

// What sixteen outputs look up, in two digits that are added up apart.
struct Looked {
    __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();

    // A byte's lower four bits, and its higher ones, in tables that lie one behind the other.
    inline __attribute__((always_inline)) void add(__m512i bytes, const uint8_t* tables) {
        const __m512i code = _mm512_set1_epi8(15);
        look(_mm512_and_si512(bytes, code), tables);
        look(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), code), tables + kTable);
    }

    // Codes from 0 to 15, one in each byte.
    inline __attribute__((always_inline)) void look(__m512i codes, const uint8_t* table) {
        const __m512i one = _mm512_set1_epi8(1);
        // A sum, not an or: of that compilers make one operation, in the unit that makes the products.
        const __m512i index = _mm512_add_epi8(codes, _mm512_set1_epi32(0x30201000));
        low = _mm512_dpbusd_epi32(low, _mm512_permutexvar_epi8(index, _mm512_load_si512(table)), one);
        high = _mm512_dpbusd_epi32(high, one, _mm512_permutexvar_epi8(index, _mm512_load_si512(table + 64)));
    }

    __m512 sum() const { return _mm512_cvtepi32_ps(_mm512_add_epi32(low, _mm512_slli_epi32(high, 8))); }
};

// Tables for codes of one bit: a row is rounded so that no sum of four columns overflows, to 1 / 16,300 of the largest of 64.
//
// Half a byte of a tile's folded vectors (tiles.h) has the codes of four columns; a chunk has four tables.
struct Tables : Units {
    Tables(int64_t rows, int64_t columns, int64_t unit) : Units(rows, columns, unit), tables(buffer<uint8_t>(chunks * 4 * kTable)) {}

    const uint8_t* of_chunk(int64_t chunk) const { return tables.get() + chunk * 4 * kTable; }

    void round_row(const void* x, int type, int64_t from, int64_t row) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const Fixed fixed(x, type, from, columns, chunk, 8150.0f);
            put(row, chunk, fixed);
            for (int which = 0; which < 4; ++which) fill(fixed.whole[which], tables.get() + (4 * chunk + which) * kTable);
        }
    }

    const Buffer<uint8_t> tables;

  private:
    // Of sixteen columns; byte b of a lane has column 4 i + b in its bit i.
    static void fill(__m512i x, uint8_t* to) {
        __m512i sum[2];
        for (int pair = 0; pair < 2; ++pair) {
            sum[pair] = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                // Lanes 0 to 15 are codes of byte 2 · pair, the others those of the next: x has a column in two lanes.
                const int column = 2 * (4 * i + 2 * pair);
                const __m512i upper = _mm512_set1_epi16(static_cast<short>(column + 2));
                const __m512i place = _mm512_mask_mov_epi16(upper, 0xffff, _mm512_set1_epi16(static_cast<short>(column)));
                static constexpr __mmask32 kSet[4] = {0xaaaaaaaa, 0xcccccccc, 0xf0f0f0f0, 0xff00ff00};
                sum[pair] = _mm512_mask_add_epi16(sum[pair], kSet[i], sum[pair], _mm512_permutexvar_epi16(place, x));
            }
        }
        store_table(sum[0], sum[1], to);
    }
};

// Chunks of both parts of a tile look up in the same tables while these are at hand.
template <int Sets>
using Chunks = const uint8_t* [Sets];

// The sums of codes of one bit and the columns from 4 * `first_step` on, `Count` of them, in units of factors.
template <int Count, int Sets>
inline __attribute__((always_inline)) void look_up(const Chunks<Sets>& chunk, const uint8_t* tables, int first_step,
                                                   __m512 (&product)[Sets][1][kVectors]) {
    Looked found[Sets][kVectors];
    const int64_t begin = first_step / 8;
#pragma GCC unroll 1
    for (int64_t h = begin; h < begin + Count / 32; ++h) {  // not unrolled: compilers would load all tables at first
#pragma GCC unroll 2
        for (int set = 0; set < Sets; ++set) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) found[set][v].add(load_bytes(chunk[set] + (h * kVectors + v) * 64), tables + 2 * h * kTable);
        }
    }
    for (int set = 0; set < Sets; ++set) {
        for (int v = 0; v < kVectors; ++v) product[set][0][v] = found[set][v].sum();
    }
}

}  // namespace ulbq

#endif
