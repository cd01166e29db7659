// Between the stored bit planes and the tiles of tiles.h, both ways.

#include <omp.h>

#include "tiles.h"

namespace ulbq {

// Sixteen steps of 16 outputs, one dword each: [step][lane].
using Square = uint32_t[kSteps][16];

// Where the bits of one step lie in a chunk: offset of the byte vector and shift, for the lower bits and for the third.
struct Place {
    int offset, shift;
};

inline Place low_place(int bits, int vector, int step) {
    if (bits == 3) return {(step / 8 * kVectors + vector) * 192 + step / 4 % 2 * 64, step % 4 * 2};
    const int fold = 8 / bits;
    return {(step / fold * kVectors + vector) * 64, step % fold * bits};
}

inline Place third_place(int vector, int step) { return {(step / 8 * kVectors + vector) * 192 + 128, step % 8}; }

inline uint32_t& lane(uint8_t* chunk, int offset, int index) { return reinterpret_cast<uint32_t*>(chunk + offset)[index]; }

constexpr uint32_t kOnes = 0x01010101;

inline void fold(const Square& square, int bits, int vector, uint8_t* chunk) {
    for (int step = 0; step < kSteps; ++step) {
        const Place low = low_place(bits, vector, step), third = third_place(vector, step);
        for (int out = 0; out < 16; ++out) {
            const uint32_t codes = square[step][out];
            if (bits == 3) {
                lane(chunk, low.offset, out) |= (codes & 3 * kOnes) << low.shift;
                lane(chunk, third.offset, out) |= (codes >> 2 & kOnes) << third.shift;
            } else {
                lane(chunk, low.offset, out) |= codes << low.shift;
            }
        }
    }
}

inline void unfold(uint8_t* chunk, int bits, int vector, Square& square) {
    const uint32_t mask = ((1u << (bits == 3 ? 2 : bits)) - 1) * kOnes;
    for (int step = 0; step < kSteps; ++step) {
        const Place low = low_place(bits, vector, step), third = third_place(vector, step);
        for (int out = 0; out < 16; ++out) {
            square[step][out] = lane(chunk, low.offset, out) >> low.shift & mask;
            if (bits == 3) square[step][out] |= (lane(chunk, third.offset, out) >> third.shift & kOnes) << 2;
        }
    }
}

inline int64_t present(int64_t row_bytes, int64_t chunk) {
    const int64_t left = row_bytes - chunk * 8;
    return left < 8 ? left : 8;
}

}  // namespace ulbq

using namespace ulbq;

// planes [bits][outs][ceil(columns / 8)] to a part of zeroed tiles: chunks of `bits` lie `stride` bytes apart.
extern "C" void ulbq_to_tiles(const uint8_t* planes, int bits, int64_t outs, int64_t columns, uint8_t* tiles,
                              int64_t stride, int threads) {
    const int64_t row_bytes = (columns + 7) / 8, chunks = (columns + kChunk - 1) / kChunk;
    const int64_t sixteens = (outs + 15) / 16;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < sixteens; ++block) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            Square square = {};
            for (int64_t out = 16 * block; out < outs && out < 16 * block + 16; ++out) {
                __m512i codes = _mm512_setzero_si512();
                for (int bit = 0; bit < bits; ++bit) {
                    uint64_t word = 0;
                    std::memcpy(&word, planes + (bit * outs + out) * row_bytes + chunk * 8, present(row_bytes, chunk));
                    codes = _mm512_mask_add_epi8(codes, word, codes, _mm512_set1_epi8(static_cast<char>(1 << bit)));
                }
                uint32_t steps[kSteps];
                _mm512_storeu_si512(steps, codes);
                for (int step = 0; step < kSteps; ++step) square[step][out % 16] = steps[step];
            }
            fold(square, bits, static_cast<int>(block % kVectors), tiles + (block / kVectors * chunks + chunk) * stride);
        }
    }
}

// The way back. What pads the tiles is dropped; bits that pad the planes' rows are zeros.
extern "C" void ulbq_from_tiles(const uint8_t* tiles, int bits, int64_t outs, int64_t columns, uint8_t* planes,
                                int64_t stride, int threads) {
    const int64_t row_bytes = (columns + 7) / 8, chunks = (columns + kChunk - 1) / kChunk;
    const int64_t sixteens = (outs + 15) / 16;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < sixteens; ++block) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            Square square;
            uint8_t* from = const_cast<uint8_t*>(tiles) + (block / kVectors * chunks + chunk) * stride;
            unfold(from, bits, static_cast<int>(block % kVectors), square);
            for (int64_t out = 16 * block; out < outs && out < 16 * block + 16; ++out) {
                uint32_t steps[kSteps];
                for (int step = 0; step < kSteps; ++step) steps[step] = square[step][out % 16];
                const __m512i codes = _mm512_loadu_si512(steps);
                for (int bit = 0; bit < bits; ++bit) {
                    const uint64_t word = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(static_cast<char>(1 << bit)));
                    std::memcpy(planes + (bit * outs + out) * row_bytes + chunk * 8, &word, present(row_bytes, chunk));
                }
            }
        }
    }
}
