// The order in which the CPU's products read integer codes: tiles of 64 outputs, a lane of 32 bits for each output.
//
// A dot product instruction takes four bytes of a lane with four bytes of activations. One *step* is four columns of 64
// outputs: vector v of four holds output 16v + l in lane l, byte c of the lane is column c of the step. The 16 steps of
// 64 columns (a *chunk*) are folded bit by bit into as few vectors as their codes fill:
//
//   1 bit   [2][4 vectors]    bit k of byte vector h is step 8h + k
//   2 bits  [4][4 vectors]    bits 2k, 2k + 1 of byte vector q are step 4q + k
//   4 bits  [8][4 vectors]    bits 4k to 4k + 3 of byte vector e are step 2e + k
//   3 bits  [2][4 vectors][3] the lower two bits of steps 8h to 8h + 3, of 8h + 4 to 8h + 7, the third bit of all eight
//
// A matrix is [tiles][chunks][parts][512 * bits bytes], its scales float16 [tiles][parts][groups][64], its zero points
// nibbles [tiles][groups][32], the low ones those of outputs 0 to 31. Outputs and columns are padded with zeros.
#pragma once

#include <vector>

#include "routes.h"

namespace ulbq {

constexpr int kTile = 64;
constexpr int kVectors = 4;
constexpr int kSteps = 16;

struct Tiles {
    Tiles(const uint8_t* codes, int bits, int parts, int64_t outs, int64_t columns, const uint16_t* scales,
          const uint8_t* zeros, float centre, int64_t group)
        : codes(codes), bits(bits), parts(parts), outs(outs), columns(columns), scales(scales), zeros(zeros),
          centre(centre), group(group) {}

    const uint8_t* codes;
    int bits;   // of a part
    int parts;  // 2 where planes have scales of their own
    int64_t outs, columns;
    const uint16_t* scales;
    const uint8_t* zeros;  // null where they are fixed
    float centre;          // the fixed zero point
    int64_t group;         // columns
    int64_t groups = columns / group;
    std::shared_ptr<const int32_t[]> group_of = groups_of_units();  // of a unit; padding counts to the last

    // The matrix of this shape at number `which` of a table [matrices][codes, scales, zeros].
    Tiles at(const int64_t* table, int64_t which) const {
        Tiles other = *this;
        other.codes = address<uint8_t>(table, 3 * which);
        other.scales = address<uint16_t>(table, 3 * which + 1);
        other.zeros = address<uint8_t>(table, 3 * which + 2);
        return other;
    }

    int64_t tiles() const { return (outs + kTile - 1) / kTile; }
    int64_t chunks() const { return (columns + kChunk - 1) / kChunk; }
    int64_t unit() const { return group == 32 ? 32 : kChunk; }
    int64_t chunk_bytes() const { return 512 * bits; }

    const uint8_t* chunk(int64_t tile, int64_t index, int part) const {
        return codes + ((tile * chunks() + index) * parts + part) * chunk_bytes();
    }
    const uint16_t* scale(int64_t tile, int part, int64_t which) const {
        return scales + ((tile * parts + part) * groups + which) * kTile;
    }

    __m512 load_scale(int64_t tile, int part, int64_t which, int vector) const {
        const uint16_t* from = scale(tile, part, which) + 16 * vector;
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    __m512 load_zero(int64_t tile, int64_t which, int vector) const {
        if (!zeros) return _mm512_set1_ps(centre);
        const uint8_t* from = zeros + (tile * groups + which) * (kTile / 2) + 16 * (vector % 2);
        const __m512i pair = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(pair, vector / 2 * 4), _mm512_set1_epi32(15)));
    }

  private:
    std::shared_ptr<const int32_t[]> groups_of_units() const {
        const int64_t units = chunks() * kChunk / unit();
        Buffer<int32_t> found = buffer<int32_t>(units);
        for (int64_t index = 0; index < units; ++index) {
            const int64_t which = index * unit() / group;
            found[index] = static_cast<int32_t>(which < groups ? which : groups - 1);
        }
        return found;
    }
};

// The matrix of each job.
inline std::vector<Tiles> of_jobs(const int64_t* table, const Tiles& shape, const int64_t* jobs, int64_t count) {
    std::vector<Tiles> found;
    found.reserve(count);
    for (int64_t job = 0; job < count; ++job) found.push_back(shape.at(table, jobs[3 * job]));
    return found;
}

inline __m512i load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }

// Codes of one step, a byte each; `vector` and `step` are constants once loops are unrolled.
template <int Bits>
inline __m512i unfold(const uint8_t* chunk, int vector, int step) {
    if (Bits == 3) {
        const uint8_t* from = chunk + (step / 8 * kVectors + vector) * 192;
        const __m512i low = _mm512_srli_epi16(load_bytes(from + step / 4 % 2 * 64), step % 4 * 2);
        const __m512i top = load_bytes(from + 128);
        const __m512i third = step % 8 < 3 ? _mm512_slli_epi16(top, 2 - step % 8) : _mm512_srli_epi16(top, step % 8 - 2);
        // (low & 3) | (third & 4) where the mask of 3 picks: 0xca is "mask ? low : third".
        const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), low, third, 0xca);
        return _mm512_and_si512(both, _mm512_set1_epi8(7));
    }
    constexpr int kFold = 8 / Bits;
    const __m512i folded = load_bytes(chunk + (step / kFold * kVectors + vector) * 64);
    const __m512i moved = step % kFold ? _mm512_srli_epi16(folded, step % kFold * Bits) : folded;
    return _mm512_and_si512(moved, _mm512_set1_epi8((1 << Bits) - 1));
}

}  // namespace ulbq
