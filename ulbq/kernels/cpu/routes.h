// Rows on their way to several matrices of one shape, as tokens are to the experts of a mixture.
#pragma once

#include "activations.h"

namespace ulbq {

// A result row is a place in `order`; the rows of one matrix, its job, have places one behind the other.
struct Routes {
    // All rows to one matrix.
    explicit Routes(int64_t rows) : whole{0, 0, rows}, jobs(whole), count(1), order(nullptr), places(rows), share(1), owner(owners()) {}
    Routes(const int64_t* jobs, int64_t count, const int64_t* order, int64_t places, int64_t share)
        : whole{}, jobs(jobs), count(count), order(order), places(places), share(share), owner(owners()) {}
    Routes(const Routes&) = delete;

    int64_t matrix(int64_t job) const { return jobs[3 * job]; }
    int64_t begin(int64_t job) const { return jobs[3 * job + 1]; }
    int64_t end(int64_t job) const { return jobs[3 * job + 2]; }
    int64_t output(int64_t place) const { return order ? order[place] : place; }
    int64_t input(int64_t place) const { return output(place) / share; }

    // Rows of the largest job.
    int64_t most() const {
        int64_t found = 0;
        for (int64_t job = 0; job < count; ++job) found = end(job) - begin(job) > found ? end(job) - begin(job) : found;
        return found;
    }

    const int64_t whole[3];
    const int64_t* jobs;  // [count][3]: which matrix, and from which place to which
    const int64_t count;
    const int64_t* order;         // [places] the row of the results; null where they come in order
    const int64_t places, share;  // `share` rows of the results, one behind the other, have one input
    const Buffer<int32_t> owner;  // [places] the job, -1 for none

  private:
    Buffer<int32_t> owners() const {
        Buffer<int32_t> found = buffer<int32_t>(places);
        for (int64_t place = 0; place < places; ++place) found[place] = -1;
        for (int64_t job = 0; job < count; ++job) {
            for (int64_t place = begin(job); place < end(job); ++place) found[place] = static_cast<int32_t>(job);
        }
        return found;
    }
};

// An address of the table of matrices: [matrices][kinds].
template <typename T>
inline const T* address(const int64_t* table, int64_t at) {
    return reinterpret_cast<const T*>(static_cast<intptr_t>(table[at]));
}

}  // namespace ulbq
