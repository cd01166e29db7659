// One token through all blocks of a model of Llama's kind.
//
// Products and attention are shared among threads. What stands between them is little work for one token: each thread
// does all of it on values of its own, so that nobody waits. Values are float32, the cache has a type of its own.

#include <omp.h>

#include <cmath>
#include <vector>

#include "linear.h"

namespace ulbq {

// A dense matrix. Its rows are read one after the other: memory gives one stream faster than several.
template <int Type>
struct DenseLinear : Linear {
    DenseLinear(const void* weight, int64_t outs, int64_t columns, const float* bias) : Linear(outs, columns, bias), weight(weight) {}

    void multiply(const float* x, float* y, Own&, float*) const override {
        share((outs + kRows - 1) / kRows, [&](int64_t piece) {
            const int64_t begin = piece * kRows;
            alignas(64) float found[kRows] = {};
            for (int64_t row = 0; row < kRows && begin + row < outs; ++row) found[row] = dot(x, (begin + row) * columns);
            for (int64_t at = 0; at < kRows && begin + at < outs; at += 16) put(y, begin + at, _mm512_load_ps(found + at));
        });
    }

  private:
    static constexpr int64_t kRows = 64, kSize = Type == kFloat32 ? 4 : 2;

    float dot(const float* x, int64_t row) const {
        __m512 sum[4] = {};
        for (int64_t at = 0; at < columns; at += 64) {
            // What is fetched by hand drives a wide input out of the first cache.
            const char* ahead = static_cast<const char*>(weight) + (row + at) * kSize + 4096;
            for (int64_t line = 0; columns < 2048 && line < 64 * kSize; line += 64) _mm_prefetch(ahead + line, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part) {
                const __mmask16 mask = first(columns - at - 16 * part);
                const __m512 value = load_floats(weight, Type, row + at + 16 * part, mask);
                sum[part] = _mm512_fmadd_ps(value, load(x + at + 16 * part, mask), sum[part]);
            }
        }
        return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
    }

    const void* const weight;
};

struct Layer {
    const Linear *queries, *keys, *values, *output, *gate, *up, *down;
    const float *before_attention, *before_mlp;  // weights of norms
    const float *query_norm, *key_norm;          // of each head; null where there are none
    uint8_t *key_cache, *value_cache;            // [shared][room][width]
};

struct Step {
    int64_t layers, hidden, heads, shared, width, intermediate;
    int64_t position, room;  // of the token in the cache, and how many a cache holds
    double epsilon, scaling;
    int64_t type;  // of the cache

    int64_t widest() const { return hidden > intermediate ? hidden : intermediate; }
};

inline void norm(const float* x, const float* weight, double epsilon, int64_t width, float* to) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < width; at += 16) {
        const __m512 value = load(x + at, first(width - at));
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    const double mean = _mm512_reduce_add_ps(sum) / static_cast<double>(width);
    const __m512 factor = all(static_cast<float>(1.0 / __builtin_sqrt(mean + epsilon)));
    for (int64_t at = 0; at < width; at += 16) {
        const __mmask16 mask = first(width - at);
        const __m512 value = _mm512_mul_ps(load(x + at, mask), factor);
        _mm512_mask_storeu_ps(to + at, mask, _mm512_mul_ps(load(weight + at, mask), value));
    }
}

inline void add(float* x, const float* y, int64_t count) {
    for (int64_t at = 0; at < count; at += 16) {
        const __mmask16 mask = first(count - at);
        _mm512_mask_storeu_ps(x + at, mask, _mm512_add_ps(load(x + at, mask), load(y + at, mask)));
    }
}

// y = silu(x) * y
inline void gate(const float* x, const float* factor, int64_t count, float* to) {
    for (int64_t at = 0; at < count; at += 16) {
        const __mmask16 mask = first(count - at);
        const __m512 value = load(x + at, mask);
        const __m512 share = inverse(_mm512_add_ps(all(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), value))));
        _mm512_mask_storeu_ps(to + at, mask, _mm512_mul_ps(_mm512_mul_ps(value, share), load(factor + at, mask)));
    }
}

// A head with its norm, if it has one, at its position. `width` is even.
inline void place(const float* x, const float* weight, const Step& step, const float* cosine, const float* sine, float* to) {
    const int64_t half = step.width / 2;
    std::vector<float> normed;
    if (weight) {
        normed.resize(step.width);
        norm(x, weight, step.epsilon, step.width, normed.data());
        x = normed.data();
    }
    for (int64_t at = 0; at < half; at += 16) {
        const __mmask16 mask = first(half - at);
        const __m512 low = load(x + at, mask), high = load(x + half + at, mask);
        const __m512 turned_low = _mm512_fnmadd_ps(high, load(sine + at, mask), _mm512_mul_ps(low, load(cosine + at, mask)));
        const __m512 turned_high =
            _mm512_fmadd_ps(low, load(sine + half + at, mask), _mm512_mul_ps(high, load(cosine + half + at, mask)));
        _mm512_mask_storeu_ps(to + at, mask, turned_low);
        _mm512_mask_storeu_ps(to + half + at, mask, turned_high);
    }
}

// Sums of the lanes of sixteen vectors.
inline __m512 sums(__m512 (&v)[16]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {  // of two vectors, their halves
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // of four, their quarters
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 4], 0x88), _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd));
    }
    for (int i = 0; i < 2; ++i) v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 2]), _mm512_unpackhi_ps(v[i], v[i + 2]));
    const __m512 sum = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    return _mm512_shuffle_f32x4(sum, sum, 0xd8);  // quarters hold vectors from 0, 8, 4 and 12 on
}

// The keys and values of a token join the cache, as those of a head that others share.
template <int Type>
void keep(const Layer& layer, const Step& step, int64_t head, const float* cosine, const float* sine, const float* keys,
          const float* values) {
    const int64_t width = step.width, own = (head * step.room + step.position) * width;
    const Buffer<float> key = buffer<float>(width);
    place(keys + head * width, layer.key_norm, step, cosine, sine, key.get());
    for (int64_t at = 0; at < width; at += 16) {
        store_floats(layer.key_cache, Type, own + at, first(width - at), load(key.get() + at, first(width - at)));
        store_floats(layer.value_cache, Type, own + at, first(width - at), load(values + head * width + at, first(width - at)));
    }
}

// One head of the token looks back, at itself too, which the cache has already.
template <int Type>
void attend(const Layer& layer, const Step& step, int64_t head, const float* cosine, const float* sine, const float* queries,
            float* output) {
    constexpr int64_t kSize = Type == kFloat32 ? 4 : 2;
    const int64_t width = step.width, group = head / (step.heads / step.shared), count = step.position + 1;
    const int64_t first_place = group * step.room * width;
    const uint8_t *key_rows = layer.key_cache + first_place * kSize, *value_rows = layer.value_cache + first_place * kSize;
    const Buffer<float> query = buffer<float>(width), scores = buffer<float>(count + 16);
    place(queries + head * width, layer.query_norm, step, cosine, sine, query.get());
    __m512 most = all(-INFINITY);
    for (int64_t begin = 0; begin < count; begin += 16) {
        __m512 sum[16];
        for (int row = 0; row < 16; ++row) {
            const int64_t from = (begin + row < count ? begin + row : count - 1) * width;
            sum[row] = _mm512_setzero_ps();
            for (int64_t at = 0; at < width; at += 16) {
                const __mmask16 mask = first(width - at);
                sum[row] = _mm512_fmadd_ps(load_floats(key_rows, Type, from + at, mask), load(query.get() + at, mask), sum[row]);
            }
        }
        const __m512 score = _mm512_mul_ps(sums(sum), all(static_cast<float>(step.scaling)));
        const __m512 seen = _mm512_mask_mov_ps(all(-INFINITY), first(count - begin), score);
        most = _mm512_max_ps(most, seen);
        _mm512_store_ps(scores.get() + begin, seen);
    }
    const __m512 largest = all(_mm512_reduce_max_ps(most));
    __m512 total = _mm512_setzero_ps();
    for (int64_t at = 0; at < count; at += 16) {
        const __m512 share = exponential(_mm512_sub_ps(_mm512_load_ps(scores.get() + at), largest));
        total = _mm512_add_ps(total, share);
        _mm512_store_ps(scores.get() + at, share);
    }
    const __m512 whole = all(1.0f / _mm512_reduce_add_ps(total));
    for (int64_t at = 0; at < width; at += 64) {
        __m512 sum[4] = {};
        for (int64_t row = 0; row < count; ++row) {
            const __m512 share = all(scores[row]);
            for (int part = 0; part < 4; ++part) {
                const int64_t place = at + 16 * part;
                const __m512 value = load_floats(value_rows, Type, row * width + place, first(width - place));
                sum[part] = _mm512_fmadd_ps(share, value, sum[part]);
            }
        }
        for (int part = 0; part < 4; ++part) {
            const int64_t place = at + 16 * part;
            _mm512_mask_storeu_ps(output + head * width + place, first(width - place), _mm512_mul_ps(sum[part], whole));
        }
    }
}

// Memory that threads share: results of products, and what products want themselves, up to three at a time.
struct Shared {
    Shared(const Layer* layers, const Step& step, const Linear* head)
        : queries(buffer<float>(step.heads * step.width)), keys(buffer<float>(step.shared * step.width)),
          values(buffer<float>(step.shared * step.width)), looked(buffer<float>(step.heads * step.width)),
          output(buffer<float>(step.hidden)), gate(buffer<float>(step.intermediate)), up(buffer<float>(step.intermediate)),
          size(largest(layers, step, head)), scratch(buffer<float>(3 * size)) {}

    float* place(int which) const { return scratch.get() + which * size; }

    static int64_t largest(const Layer* layers, const Step& step, const Linear* head) {
        int64_t found = head ? head->scratch() : 0;
        for (const Layer* layer = layers; layer < layers + step.layers; ++layer) {
            for (const Linear* one : {layer->queries, layer->keys, layer->values, layer->output, layer->gate, layer->up, layer->down}) {
                if (one->scratch() > found) found = one->scratch();
            }
        }
        return (found + 15) / 16 * 16;
    }

    const Buffer<float> queries, keys, values, looked, output, gate, up;
    const int64_t size;
    const Buffer<float> scratch;
};

// One block, by each thread: x is its own, `inner` memory for the widest input.
template <int Type>
void block(const Layer& layer, const Step& step, const float* cosine, const float* sine, const Shared& shared, Own& own,
           float* x, float* inner) {
    norm(x, layer.before_attention, step.epsilon, step.hidden, inner);
    own.renew();
    layer.queries->multiply(inner, shared.queries.get(), own, shared.place(0));
    layer.keys->multiply(inner, shared.keys.get(), own, shared.place(1));
    layer.values->multiply(inner, shared.values.get(), own, shared.place(2));
#pragma omp barrier
    share(step.shared, [&](int64_t head) {
        keep<Type>(layer, step, head, cosine, sine, shared.keys.get(), shared.values.get());
    });
#pragma omp barrier
    share(step.heads, [&](int64_t head) {
        attend<Type>(layer, step, head, cosine, sine, shared.queries.get(), shared.looked.get());
    });
#pragma omp barrier
    own.renew();
    layer.output->multiply(shared.looked.get(), shared.output.get(), own, shared.place(0));
#pragma omp barrier
    add(x, shared.output.get(), step.hidden);
    norm(x, layer.before_mlp, step.epsilon, step.hidden, inner);
    own.renew();
    layer.gate->multiply(inner, shared.gate.get(), own, shared.place(1));
    layer.up->multiply(inner, shared.up.get(), own, shared.place(2));
#pragma omp barrier
    gate(shared.gate.get(), shared.up.get(), step.intermediate, inner);
    own.renew();
    layer.down->multiply(inner, shared.output.get(), own, shared.place(0));
#pragma omp barrier
    add(x, shared.output.get(), step.hidden);
}

}  // namespace ulbq

using namespace ulbq;

// A dense matrix of a type for ulbq_decode.
extern "C" void ulbq_dense_linear(const void* weight, int type, int64_t outs, int64_t columns, const float* bias, const Linear** made) {
    by_type(type, [&](auto of) { *made = new DenseLinear<decltype(of)::value>(weight, outs, columns, bias); });
}

extern "C" void ulbq_free_linear(const Linear* one) { delete one; }

// The embedding x [hidden] of a token becomes what the last norm makes of it; `logits` what `head` makes of that, where
// it is not null. `cosine` and `sine` [width] are of the token's position. Its keys and values join the caches.
extern "C" void ulbq_decode(const Layer* layers, const Step* given, const float* last_norm, const Linear* head,
                            const float* cosine, const float* sine, float* x, float* logits, int threads) {
    const Step& step = *given;
    const Shared shared(layers, step, head);
    by_type(static_cast<int>(step.type), [&](auto type) {
#pragma omp parallel num_threads(threads)
        {
            Own own;
            const Buffer<float> mine = buffer<float>(step.hidden), inner = buffer<float>(step.widest());
            std::memcpy(mine.get(), x, step.hidden * sizeof(float));
            for (int64_t index = 0; index < step.layers; ++index) {
                block<decltype(type)::value>(layers[index], step, cosine, sine, shared, own, mine.get(), inner.get());
            }
            norm(mine.get(), last_norm, step.epsilon, step.hidden, inner.get());
            own.renew();
            if (head) head->multiply(inner.get(), logits, own, shared.place(0));
#pragma omp barrier
#pragma omp master
            std::memcpy(x, inner.get(), step.hidden * sizeof(float));
        }
    });
}
