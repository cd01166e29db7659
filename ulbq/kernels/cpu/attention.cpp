// Causal attention in bfloat16 for training, forward and back, by dot products of pairs.
//
// Queries go 64 at a time, one in each lane: scores are [keys][64], so that the softmax runs down the lanes and no sum
// goes across them. A product takes rows of pairs on its left and, on its right, pairs that lie side by side in lanes;
// whatever a product needs of a chunk is brought into such an order first. On the way back probabilities are made anew
// from the logarithm of their sum. Sums, scores and the softmax are float32. Tokens are padded with zeros to whole
// chunks: padded keys come after all queries that count, and padded queries have no gradient.
#ifdef __AVX512BF16__

#include <omp.h>

#include <cmath>

#include "vectors.h"

namespace ulbq {

constexpr int64_t kLanes = 64;  // queries of a chunk

using Pairs = Buffer<uint32_t>;

// Rows i of `a` times lanes of `b`, for 16 * Vectors lanes: c[i] (+)= sum over p of a[i][p] . b[p].
template <int Vectors>
inline void product(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, int64_t rows, int64_t pairs,
                    float* c, int64_t c_row, bool add) {
    for (int64_t i = 0; i < rows; i += 4) {
        __m512 sum[4][Vectors];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) {
                sum[r][v] = add ? _mm512_loadu_ps(c + (i + r) * c_row + 16 * v) : _mm512_setzero_ps();
            }
        }
        for (int64_t p = 0; p < pairs; ++p) {
            __m512i right[Vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) right[v] = _mm512_loadu_si512(b + p * b_row + 16 * v);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                const __m512i left = _mm512_set1_epi32(static_cast<int>(a[(i + r) * a_row + p]));
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)left, (__m512bh)right[v]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(c + (i + r) * c_row + 16 * v, sum[r][v]);
        }
    }
}

// The same for any number of lanes that 16 divides.
inline void product(const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t lanes, int64_t rows, int64_t pairs,
                    float* c, bool add) {
    int64_t lane = 0;
    for (; lane + 64 <= lanes; lane += 64) product<4>(a, a_row, b + lane, lanes, rows, pairs, c + lane, lanes, add);
    for (; lane + 32 <= lanes; lane += 32) product<2>(a, a_row, b + lane, lanes, rows, pairs, c + lane, lanes, add);
    for (; lane < lanes; lane += 16) product<1>(a, a_row, b + lane, lanes, rows, pairs, c + lane, lanes, add);
}

// Places of [batch][heads][tokens][width], the last side by side.
struct Heads {
    uint16_t* data;
    const int64_t* stride;
    uint16_t* row(int64_t batch, int64_t head, int64_t token) const {
        return data + batch * stride[0] + head * stride[1] + token * stride[2];
    }
};

struct Shape {
    int64_t batch, heads, shared, tokens, width;
    float scale;
    int64_t padded() const { return (tokens + kLanes - 1) / kLanes * kLanes; }
    int64_t pairs() const { return width / 2; }
};

// Tokens from `begin` on, `count` of them with zeros behind the last: [count][width].
inline void gather(const Heads& x, const Shape& shape, int64_t batch, int64_t head, int64_t begin, int64_t count, uint32_t* to) {
    const int64_t there = begin + count <= shape.tokens ? count : shape.tokens - begin;
    for (int64_t t = 0; t < there; ++t) std::memcpy(to + t * shape.pairs(), x.row(batch, head, begin + t), shape.width * 2);
    std::memset(to + there * shape.pairs(), 0, (count - there) * shape.width * 2);
}

// [rows][columns] to [columns][rows].
template <typename T>
inline void transpose(const T* from, int64_t rows, int64_t columns, T* to) {
    for (int64_t block = 0; block < rows; block += 16) {
        for (int64_t c = 0; c < columns; ++c) {
            for (int64_t r = block; r < block + 16; ++r) to[c * rows + r] = from[r * columns + c];
        }
    }
}

inline __m512i halves(__m512 value) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value)); }
inline __m512i paired(__m512i even, __m512i odd) { return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)); }

// Pairs of rows side by side in lanes: [rows][width] to [rows / 2][width].
inline void interleave(const uint32_t* from, int64_t rows, int64_t width, uint32_t* to) {
    const uint16_t* values = reinterpret_cast<const uint16_t*>(from);
    for (int64_t p = 0; p < rows / 2; ++p) {
        for (int64_t c = 0; c < width; c += 16) {
            const uint16_t* at = values + 2 * p * width + c;
            const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
            const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + width)));
            _mm512_storeu_si512(to + p * width + c, paired(even, odd));
        }
    }
}

// Writes lanes [width][64] of a chunk as tokens.
inline void scatter(const float* lanes, const Shape& shape, const Heads& to, int64_t batch, int64_t head, int64_t begin,
                    float* scratch) {
    for (int64_t c = 0; c < shape.width; ++c) {
        for (int64_t q = 0; q < kLanes; ++q) scratch[q * shape.width + c] = lanes[c * kLanes + q];
    }
    for (int64_t q = 0; q < kLanes && begin + q < shape.tokens; ++q) {
        uint16_t* row = to.row(batch, head, begin + q);
        for (int64_t c = 0; c < shape.width; c += 16) store_rounded(row, kBFloat16, c, 0xffff, _mm512_loadu_ps(scratch + q * shape.width + c));
    }
}

// Which of 16 queries from lane 16 * v on may look at a key; `ahead` is the key's place less that of lane 0.
inline __mmask16 allowed(int64_t ahead, int v) {
    const int64_t skipped = ahead - 16 * v;
    return skipped <= 0 ? 0xffff : skipped >= 16 ? 0 : static_cast<__mmask16>(0xffff << skipped);
}

// Memory of one thread for the way forward.
struct Forward {
    explicit Forward(const Shape& s)
        : keys(buffer<uint32_t>(s.padded() * s.pairs())), values(buffer<uint32_t>(s.padded() * s.pairs())),
          values_across(buffer<uint32_t>(s.padded() * s.pairs())), chunk(buffer<uint32_t>(kLanes * s.pairs())),
          queries(buffer<uint32_t>(kLanes * s.pairs())), shares(buffer<uint32_t>(s.padded() / 2 * kLanes)),
          scores(buffer<float>(s.padded() * kLanes)), lanes(buffer<float>(s.width * kLanes)),
          scratch(buffer<float>(s.width * kLanes)) {}
    const Pairs keys, values, values_across, chunk, queries, shares;
    const Buffer<float> scores, lanes, scratch;
};

// Turns scores [keys][64] into pairs of probabilities that are not divided by their sum yet; the sums, and the logs.
inline void softmax(const Shape& shape, int64_t begin, int64_t keys, float* scores, uint32_t* shares, float* sums, float* logs) {
    __m512 most[4], sum[4];
    for (int v = 0; v < 4; ++v) most[v] = all(-INFINITY), sum[v] = _mm512_setzero_ps();
    for (int64_t key = 0; key < keys; ++key) {
        for (int v = 0; v < 4; ++v) {
            float* at = scores + key * kLanes + 16 * v;
            const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(at), all(shape.scale));
            const __m512 seen = _mm512_mask_mov_ps(all(-INFINITY), allowed(key - begin, v), value);
            most[v] = _mm512_max_ps(most[v], seen);
            _mm512_storeu_ps(at, seen);
        }
    }
    for (int64_t key = 0; key < keys; key += 2) {
        for (int v = 0; v < 4; ++v) {
            const float* at = scores + key * kLanes + 16 * v;
            const __m512 even = exponential(_mm512_sub_ps(_mm512_loadu_ps(at), most[v]));
            const __m512 odd = exponential(_mm512_sub_ps(_mm512_loadu_ps(at + kLanes), most[v]));
            sum[v] = _mm512_add_ps(sum[v], _mm512_add_ps(even, odd));
            _mm512_storeu_si512(shares + key / 2 * kLanes + 16 * v, paired(halves(even), halves(odd)));
        }
    }
    for (int v = 0; v < 4; ++v) {
        _mm512_storeu_ps(sums + 16 * v, sum[v]);
        _mm512_storeu_ps(logs + 16 * v, most[v]);
    }
    for (int64_t q = 0; q < kLanes; ++q) logs[q] += std::log(sums[q]);
}

// Memory of one thread for the way back.
struct Backward {
    explicit Backward(const Shape& s)
        : keys(buffer<uint32_t>(s.padded() * s.pairs())), values(buffer<uint32_t>(s.padded() * s.pairs())),
          keys_across(buffer<uint32_t>(s.padded() * s.pairs())), queries(buffer<uint32_t>(kLanes * s.pairs())),
          queries_across(buffer<uint32_t>(kLanes * s.pairs())), query_pairs(buffer<uint32_t>(kLanes * s.pairs())),
          incoming(buffer<uint32_t>(kLanes * s.pairs())), incoming_across(buffer<uint32_t>(kLanes * s.pairs())),
          incoming_pairs(buffer<uint32_t>(kLanes * s.pairs())), outputs(buffer<uint32_t>(kLanes * s.pairs())),
          shares(buffer<uint32_t>(s.padded() * kLanes / 2)), slopes(buffer<uint32_t>(s.padded() * kLanes / 2)),
          slope_pairs(buffer<uint32_t>(s.padded() * kLanes / 2)), scores(buffer<float>(s.padded() * kLanes)),
          pulls(buffer<float>(s.padded() * kLanes)), lanes(buffer<float>(s.width * kLanes)),
          scratch(buffer<float>(s.width * kLanes)), to_keys(buffer<float>(s.padded() * s.width)),
          to_values(buffer<float>(s.padded() * s.width)), logs(buffer<float>(kLanes)), shifts(buffer<float>(kLanes)) {}
    const Pairs keys, values, keys_across, queries, queries_across, query_pairs, incoming, incoming_across, incoming_pairs,
        outputs, shares, slopes, slope_pairs;
    const Buffer<float> scores, pulls, lanes, scratch, to_keys, to_values, logs, shifts;
};

// What the softmax takes off the gradient of each query's scores.
inline void find_shifts(const Shape& shape, const uint32_t* incoming, const uint32_t* outputs, float* shifts) {
    for (int64_t q = 0; q < kLanes; ++q) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = q * shape.width; c < (q + 1) * shape.width; c += 16) {
            sum = _mm512_fmadd_ps(load_floats(incoming, kBFloat16, c, 0xffff), load_floats(outputs, kBFloat16, c, 0xffff), sum);
        }
        shifts[q] = _mm512_reduce_add_ps(sum);
    }
}

// Probabilities [keys][64] and gradients of the scores in both orders, from scores and gradients of probabilities.
inline void slopes(const Shape& shape, int64_t begin, int64_t keys, const Backward& m) {
    uint16_t *shares = reinterpret_cast<uint16_t*>(m.shares.get()), *natural = reinterpret_cast<uint16_t*>(m.slopes.get());
    for (int64_t key = 0; key < keys; key += 2) {
        for (int v = 0; v < 4; ++v) {
            const __m512 log = _mm512_loadu_ps(m.logs.get() + 16 * v), shift = _mm512_loadu_ps(m.shifts.get() + 16 * v);
            __m512i half[2];
            for (int64_t odd = 0; odd < 2; ++odd) {
                const int64_t at = (key + odd) * kLanes + 16 * v;
                const __m512 score = _mm512_fmsub_ps(_mm512_loadu_ps(m.scores.get() + at), all(shape.scale), log);
                const __m512 share = _mm512_maskz_mov_ps(allowed(key + odd - begin, v), exponential(score));
                const __m512 pull = _mm512_sub_ps(_mm512_loadu_ps(m.pulls.get() + at), shift);
                const __m512 slope = _mm512_mul_ps(_mm512_mul_ps(share, pull), all(shape.scale));
                half[odd] = halves(slope);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(shares + at), (__m256i)_mm512_cvtneps_pbh(share));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(natural + at), _mm512_cvtepi32_epi16(half[odd]));
            }
            _mm512_storeu_si512(m.slope_pairs.get() + key / 2 * kLanes + 16 * v, paired(half[0], half[1]));
        }
    }
}

inline void put(const float* from, const Shape& shape, const Heads& to, int64_t batch, int64_t head) {
    for (int64_t t = 0; t < shape.tokens; ++t) {
        uint16_t* row = to.row(batch, head, t);
        for (int64_t c = 0; c < shape.width; c += 16) store_rounded(row, kBFloat16, c, 0xffff, _mm512_loadu_ps(from + t * shape.width + c));
    }
}

}  // namespace ulbq

using namespace ulbq;

// Tensors are bfloat16 [batch][heads][tokens][width] (keys and values with `shared` heads), 16 divides the width;
// `strides` has three of each tensor, in the order of the arguments. `logs` is float32 [batch][heads][tokens].
extern "C" void ulbq_attend(uint16_t* queries, uint16_t* keys, uint16_t* values, uint16_t* outputs, const int64_t* strides,
                            int64_t batch, int64_t heads, int64_t shared, int64_t tokens, int64_t width, float scale,
                            float* logs, int threads) {
    const Shape shape{batch, heads, shared, tokens, width, scale};
    const Heads q{queries, strides}, k{keys, strides + 3}, v{values, strides + 6}, o{outputs, strides + 9};
    const int64_t each = heads / shared, padded = shape.padded(), pairs = shape.pairs();
#pragma omp parallel num_threads(threads)
    {
        const Forward m(shape);
        float sums[kLanes], chunk_logs[kLanes];
#pragma omp for schedule(static) collapse(2)
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t s = 0; s < shared; ++s) {
                gather(k, shape, b, s, 0, padded, m.keys.get());
                gather(v, shape, b, s, 0, padded, m.values.get());
                transpose(reinterpret_cast<uint16_t*>(m.values.get()), padded, width, reinterpret_cast<uint16_t*>(m.values_across.get()));
                for (int64_t h = s * each; h < (s + 1) * each; ++h) {
                    for (int64_t begin = 0; begin < tokens; begin += kLanes) {
                        const int64_t seen = begin + kLanes;
                        gather(q, shape, b, h, begin, kLanes, m.chunk.get());
                        transpose(m.chunk.get(), kLanes, pairs, m.queries.get());
                        product(m.keys.get(), pairs, m.queries.get(), kLanes, seen, pairs, m.scores.get(), false);
                        softmax(shape, begin, seen, m.scores.get(), m.shares.get(), sums, chunk_logs);
                        product(m.values_across.get(), padded / 2, m.shares.get(), kLanes, width, seen / 2, m.lanes.get(), false);
                        for (int64_t c = 0; c < width; ++c) {
                            for (int64_t lane = 0; lane < kLanes; ++lane) m.lanes[c * kLanes + lane] /= sums[lane];
                        }
                        scatter(m.lanes.get(), shape, o, b, h, begin, m.scratch.get());
                        const int64_t left = tokens - begin < kLanes ? tokens - begin : kLanes;
                        std::memcpy(logs + (b * heads + h) * tokens + begin, chunk_logs, left * sizeof(float));
                    }
                }
            }
        }
    }
}

// The same tensors, then the gradient of the outputs, then where those of queries, keys and values go.
extern "C" void ulbq_attend_back(uint16_t* queries, uint16_t* keys, uint16_t* values, uint16_t* outputs, uint16_t* gradients,
                                 uint16_t* to_queries, uint16_t* to_keys, uint16_t* to_values, const int64_t* strides,
                                 int64_t batch, int64_t heads, int64_t shared, int64_t tokens, int64_t width, float scale,
                                 const float* logs, int threads) {
    const Shape shape{batch, heads, shared, tokens, width, scale};
    const Heads q{queries, strides}, k{keys, strides + 3}, v{values, strides + 6}, o{outputs, strides + 9},
        g{gradients, strides + 12}, dq{to_queries, strides + 15}, dk{to_keys, strides + 18}, dv{to_values, strides + 21};
    const int64_t each = heads / shared, padded = shape.padded(), pairs = shape.pairs();
#pragma omp parallel num_threads(threads)
    {
        const Backward m(shape);
#pragma omp for schedule(static) collapse(2)
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t s = 0; s < shared; ++s) {
                gather(k, shape, b, s, 0, padded, m.keys.get());
                gather(v, shape, b, s, 0, padded, m.values.get());
                transpose(reinterpret_cast<uint16_t*>(m.keys.get()), padded, width, reinterpret_cast<uint16_t*>(m.keys_across.get()));
                std::memset(m.to_keys.get(), 0, padded * width * sizeof(float));
                std::memset(m.to_values.get(), 0, padded * width * sizeof(float));
                for (int64_t h = s * each; h < (s + 1) * each; ++h) {
                    for (int64_t begin = 0; begin < tokens; begin += kLanes) {
                        const int64_t seen = begin + kLanes, left = tokens - begin < kLanes ? tokens - begin : kLanes;
                        gather(q, shape, b, h, begin, kLanes, m.queries.get());
                        gather(g, shape, b, h, begin, kLanes, m.incoming.get());
                        gather(o, shape, b, h, begin, kLanes, m.outputs.get());
                        std::memset(m.logs.get(), 0, kLanes * sizeof(float));
                        std::memcpy(m.logs.get(), logs + (b * heads + h) * tokens + begin, left * sizeof(float));
                        find_shifts(shape, m.incoming.get(), m.outputs.get(), m.shifts.get());
                        transpose(m.queries.get(), kLanes, pairs, m.queries_across.get());
                        transpose(m.incoming.get(), kLanes, pairs, m.incoming_across.get());
                        interleave(m.queries.get(), kLanes, width, m.query_pairs.get());
                        interleave(m.incoming.get(), kLanes, width, m.incoming_pairs.get());
                        product(m.keys.get(), pairs, m.queries_across.get(), kLanes, seen, pairs, m.scores.get(), false);
                        product(m.values.get(), pairs, m.incoming_across.get(), kLanes, seen, pairs, m.pulls.get(), false);
                        slopes(shape, begin, seen, m);
                        product(m.shares.get(), kLanes / 2, m.incoming_pairs.get(), width, seen, kLanes / 2, m.to_values.get(), true);
                        product(m.slopes.get(), kLanes / 2, m.query_pairs.get(), width, seen, kLanes / 2, m.to_keys.get(), true);
                        product(m.keys_across.get(), padded / 2, m.slope_pairs.get(), kLanes, width, seen / 2, m.lanes.get(), false);
                        scatter(m.lanes.get(), shape, dq, b, h, begin, m.scratch.get());
                    }
                }
                put(m.to_keys.get(), shape, dk, b, s);
                put(m.to_values.get(), shape, dv, b, s);
            }
        }
    }
}

#endif
