// Products of one token, made by a team of threads that runs already: each calls the same functions in the same order.
#pragma once

#include <omp.h>

#include <optional>
#include <tuple>

#include "lookups.h"
#include "vectors.h"

namespace ulbq {

// What a thread has to itself, for the input that it multiplies now.
struct Own {
    void renew() {
        std::apply([](auto&... kept) { (kept.reset(), ...); }, rounded_);
    }

    // The input in fixed point, made once for all matrices that read it.
    template <class Kind>
    const Kind& rounded(const float* x, int64_t columns, int64_t unit) {
        auto& kept = std::get<std::optional<Kind>>(rounded_);
        if (!kept || kept->unit != unit) {
            kept.emplace(1, columns, unit);
            kept->round_row(x, kFloat32, 0, 0);
        }
        return *kept;
    }

  private:
    template <class... Kinds>
    using Each = std::tuple<std::optional<Kinds>...>;
#ifdef __AVX512VBMI__
    Each<Activations<2>, Activations<3>, Tables> rounded_;
#else
    Each<Activations<2>, Activations<3>> rounded_;
#endif
};

// Shares pieces of work among the threads that run already, without a barrier behind them: few evenly, which costs
// nothing, many as threads have time. Neighbours, which lie one behind the other in memory, go together.
template <class Run>
inline void share(int64_t pieces, const Run& run) {
    const int threads = omp_get_num_threads();
    if (pieces < 16 * threads) {
#pragma omp for schedule(static) nowait
        for (int64_t piece = 0; piece < pieces; ++piece) run(piece);
    } else {
#pragma omp for schedule(dynamic, pieces / (8 * threads)) nowait
        for (int64_t piece = 0; piece < pieces; ++piece) run(piece);
    }
}

// A matrix [outs][columns], and a bias [outs] or null.
struct Linear {
    Linear(int64_t outs, int64_t columns, const float* bias) : outs(outs), columns(columns), bias(bias) {}
    virtual ~Linear() = default;

    // Floats that the threads of `multiply` share.
    virtual int64_t scratch() const { return 0; }

    // y = matrix · x + bias. Every thread may have its own copy of x; y is whole behind the next barrier.
    virtual void multiply(const float* x, float* y, Own& own, float* scratch) const = 0;

    // Writes up to 16 of the outputs, `value` less their bias.
    void put(float* y, int64_t at, __m512 value) const {
        const __mmask16 mask = first(outs - at);
        if (bias) value = _mm512_add_ps(value, load(bias + at, mask));
        _mm512_mask_storeu_ps(y + at, mask, value);
    }

    const int64_t outs, columns;
    const float* const bias;
};

}  // namespace ulbq
