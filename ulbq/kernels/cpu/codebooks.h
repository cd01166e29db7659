// Column codebooks as they are stored. Columns are sorted by width, the widest first; `order` says which each is.
#pragma once

#include <vector>

#include "routes.h"

namespace ulbq {

struct Columns {
    const uint8_t* codes;      // [planes][outs / 8]
    int64_t outs, columns;
    const int64_t* counts;     // columns that have plane 0, 1, 2, 3: the first so many in sorted order
    const uint16_t* levels;    // float16, one column's after the other's
    const int32_t* order;      // which column of the matrix each sorted one is
    const int32_t* starts;     // [outs + 1] of each output's outliers; null where there are none
    const int32_t* outlier_columns;
    const float* deltas;       // an outlier's value less the level that its code names
};

// The matrix of each job, at the addresses of a table [matrices][codes, levels, order, starts, outlier columns, deltas].
inline std::vector<Columns> of_jobs(const int64_t* table, int64_t outs, int64_t columns, const int64_t* counts,
                                    const int64_t* jobs, int64_t count) {
    std::vector<Columns> found;
    found.reserve(count);
    for (int64_t job = 0; job < count; ++job) {
        const int64_t* own = table + 6 * jobs[3 * job];
        found.push_back({address<uint8_t>(own, 0), outs, columns, counts, address<uint16_t>(own, 1), address<int32_t>(own, 2),
                         address<int32_t>(own, 3), address<int32_t>(own, 4), address<float>(own, 5)});
    }
    return found;
}

inline int width(const Columns& w, int64_t column) {
    return column < w.counts[3] ? 4 : column < w.counts[2] ? 3 : 2;
}

// First row of each plane's codes.
struct Planes {
    explicit Planes(const Columns& w) : base{0, w.counts[0], w.counts[0] + w.counts[1], w.counts[0] + w.counts[1] + w.counts[2]} {}

    int64_t row(int bit, int64_t column) const { return base[bit] + column; }

    const int64_t base[4];
};

inline float value(const void* x, int type, int64_t index) {
    return _mm512_cvtss_f32(load_floats(x, type, index, 1));
}

}  // namespace ulbq
