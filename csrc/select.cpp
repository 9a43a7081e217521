// Exact selection of the smallest scores by narrowing a range of bit patterns; nothing is sorted.
//
// A non-negative float orders as its bits do. select_smallest estimates from a sample a range that holds the count-th
// smallest score, and one pass over the matrix counts what lies below and collects what lies inside; histograms of what
// was collected narrow the range to one value. If the sample misled, histograms of the whole matrix do the same.
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace thanos::THANOS_ISA {
namespace {

constexpr int kBinBits = 12;
constexpr int kBins = 1 << kBinBits;
constexpr uint32_t kLargest = 0x7fffffff;
constexpr int64_t kSample = 16384;
constexpr int64_t kAhead = 512;  // floats; further than a processor prefetches by itself where rows do not join
constexpr int64_t kRowsAhead = 4;  // of a block, to prefetch
constexpr int kStep = 16;  // scores handled at a time

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline uint32_t score(float weight, float norm) { return bits_of(__builtin_fabsf(weight) * norm) & kLargest; }

#if defined(__AVX512F__)
inline __m512i scores(__mmask16 valid, const float* weights, const float* norms) {
    const __m512i absolute = _mm512_set1_epi32(kLargest);
    __m512i weight = _mm512_and_si512(_mm512_maskz_loadu_epi32(valid, weights), absolute);
    __m512 product = _mm512_mul_ps(_mm512_castsi512_ps(weight), _mm512_maskz_loadu_ps(valid, norms));
    return _mm512_and_si512(_mm512_castps_si512(product), absolute);
}
#endif

// The values low..high, of which `rank` (from 1) counted from the smallest is sought.
struct Range {
    uint32_t low, high;
    int64_t rank;

    int shift() const {
        int bits = 32 - __builtin_clz((high - low) | 1);
        return bits > kBinBits ? bits - kBinBits : 0;
    }

    // Narrows to the histogram's bin that holds the rank, and returns how many values it has.
    int64_t narrow(const int64_t* counts) {
        int bin = 0;
        while (bin < kBins - 1 && rank > counts[bin]) rank -= counts[bin++];
        low += static_cast<uint32_t>(bin) << shift_used;
        uint32_t end = low + ((1u << shift_used) - 1);
        high = end < high ? end : high;
        return counts[bin];
    }

    int shift_used = 0;
};

struct Threshold {
    uint32_t value;    // the rank-th smallest score
    int64_t ties;      // how many scores equal it
    int64_t wanted;    // how many of those are to be taken
};

void count_list(const uint32_t* list, int64_t length, const Range& range, int64_t* counts) {
    for (int64_t i = 0; i < length; ++i) ++counts[(list[i] - range.low) >> range.shift_used];
}

// Removes from a list what lies outside the range; returns the new length.
int64_t keep_inside(uint32_t* list, int64_t length, const Range& range) {
    int64_t kept = 0;
    for (int64_t i = 0; i < length; ++i) {
        uint32_t value = list[i];
        list[kept] = value;
        kept += value - range.low <= range.high - range.low;
    }
    return kept;
}

// The range narrowed to one value within a list, which is overwritten.
Threshold narrow_list(uint32_t* list, int64_t length, Range range, int64_t* counts) {
    for (;;) {
        range.shift_used = range.shift();
        std::memset(counts, 0, kBins * sizeof *counts);
        count_list(list, length, range, counts);
        int64_t inside = range.narrow(counts);
        if (range.shift_used == 0) return {range.low, inside, range.rank};
        length = keep_inside(list, length, range);
    }
}

// Random bits that depend on the index alone (splitmix64).
inline uint64_t mixed(uint64_t index) {
    uint64_t bits = (index + 1) * 0x9e3779b97f4a7c15u;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
    return bits ^ (bits >> 31);
}

struct Matrix {
    const float* weights;
    int64_t stride;
    const float* norms;
    int64_t rows, columns;

    const float* row(int64_t i) const { return weights + i * stride; }
};

// Counts a row's scores below the range and appends those inside to `list`, which has kStep elements of room to spare.
// Returns the new length; stops appending, with a length beyond `capacity`, when that is reached.
int64_t collect_row(const Matrix& matrix, int64_t row, const Range& range, int64_t* below, uint32_t* list,
                    int64_t length, int64_t capacity) {
    const float* weights = matrix.row(row);
    const float* norms = matrix.norms;
    int64_t under = 0, column = 0;
#if defined(__AVX512F__)
    const __m512i low = _mm512_set1_epi32(range.low), high = _mm512_set1_epi32(range.high);
    const int64_t turn = matrix.columns - kAhead;  // from there on, what is ahead lies in a later row
    const float* next = matrix.row(minimum(row + ceil_div(kAhead, matrix.columns), matrix.rows - 1));
    if (turn > 0) next -= turn;
    __m512i unders = _mm512_setzero_si512();
    for (; column < matrix.columns; column += kStep) {
        __mmask16 valid = matrix.columns - column >= kStep ? 0xffff : (1u << (matrix.columns - column)) - 1;
        _mm_prefetch(reinterpret_cast<const char*>(column < turn ? weights + column + kAhead : next + column), _MM_HINT_T0);
        __m512i bits = scores(valid, weights + column, norms + column);
        __mmask16 less = _mm512_mask_cmplt_epi32_mask(valid, bits, low);
        __mmask16 inside = _mm512_mask_cmple_epi32_mask(valid & ~less, bits, high);
        unders = _mm512_mask_add_epi32(unders, less, unders, _mm512_set1_epi32(1));
        if (length > capacity) return length;
        _mm512_storeu_si512(list + length, _mm512_maskz_compress_epi32(inside, bits));
        length += __builtin_popcount(inside);
    }
    under = _mm512_reduce_add_epi32(unders);
#else
    for (; column < matrix.columns; column += kStep) {
        int step = static_cast<int>(minimum(kStep, matrix.columns - column));
        uint32_t bits[kStep];
        int less = 0, inside = 0;
        if (step == kStep) {
            for (int i = 0; i < kStep; ++i) bits[i] = score(weights[column + i], norms[column + i]);
        } else {
            for (int i = 0; i < step; ++i) bits[i] = score(weights[column + i], norms[column + i]);
            for (int i = step; i < kStep; ++i) bits[i] = UINT32_MAX;
        }
        for (int i = 0; i < kStep; ++i) {
            less += bits[i] < range.low;
            inside += bits[i] <= range.high;
        }
        under += less;
        if (length > capacity) return length;
        if (inside == less) continue;
        for (int i = 0; i < kStep; ++i) {
            list[length] = bits[i];
            length += bits[i] >= range.low && bits[i] <= range.high;
        }
    }
#endif
    *below += under;
    return length;
}

void histogram_row(const Matrix& matrix, int64_t row, const Range& range, int64_t* counts) {
    const float* weights = matrix.row(row);
    uint32_t span = range.high - range.low;
    for (int64_t column = 0; column < matrix.columns; ++column) {
        uint32_t offset = score(weights[column], matrix.norms[column]) - range.low;
        if (offset <= span) ++counts[offset >> range.shift_used];
    }
}

// A part is a run of rows with a list of its own: parts do not depend on which thread runs them.
struct Part {
    int64_t begin, end, capacity, length, below;
    uint32_t* list;
};

class Selector {
public:
    Selector(const Matrix& matrix, int threads)
        : matrix_(matrix),
          threads_(threads),
          parts_count_(maximum(2, minimum(matrix.rows, 8 * threads))),
          total_(matrix.rows * matrix.columns),
          share_(total_ > kSmall ? 8 : 1),
          parts_space_(parts_count_ * sizeof(Part)),
          counts_space_((parts_count_ + 1) * kBins * sizeof(int64_t)),
          lists_space_((total_ / share_ + parts_count_ * (kPartMinimum + 2 * kStep) + 3 * kSample) * sizeof(uint32_t)),
          parts_(reinterpret_cast<Part*>(parts_space_.data())),
          counts_(reinterpret_cast<int64_t*>(counts_space_.data())),
          sample_(reinterpret_cast<uint32_t*>(lists_space_.data())) {
        uint32_t* list = sample_ + 3 * kSample;
        for (int64_t p = 0; p < parts_count_; ++p) {
            int64_t begin = matrix.rows * p / parts_count_, end = matrix.rows * (p + 1) / parts_count_;
            int64_t capacity = (end - begin) * matrix.columns / share_ + kPartMinimum;
            parts_[p] = {begin, end, capacity, 0, 0, list};
            list += capacity + kStep;
        }
    }

    Threshold find(int64_t rank) {
        Range range = total_ > kSmall ? estimate(rank) : Range{0, kLargest, rank};
        if (!collect(range)) {
            range = {0, kLargest, rank};
            for (;;) {
                int shift = range.shift_used = range.shift();
                int64_t inside = histogram(range);
                if (shift == 0) return {range.low, inside, range.rank};
                Range within = range;
                if (inside <= total_ / (2 * share_) && collect_within(within)) return narrow_parts(within);
            }
        }
        return narrow_parts(range);
    }

private:
    static constexpr int64_t kSmall = 4 * kSample;  // up to this size the lists hold everything
    static constexpr int64_t kPartMinimum = 4096;

    // The range in which a sample of random positions expects the rank, five standard deviations to either side.
    Range estimate(int64_t rank) {
        parallel_for(threads_, kSample, kSample / 16, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) {
                uint64_t random = mixed(i);
                int64_t row = static_cast<int64_t>(((random >> 32) * static_cast<uint64_t>(matrix_.rows)) >> 32);
                random &= 0xffffffffu;
                int64_t column = static_cast<int64_t>((random * static_cast<uint64_t>(matrix_.columns)) >> 32);
                sample_[i] = score(matrix_.row(row)[column], matrix_.norms[column]);
            }
        });
        double share = static_cast<double>(rank) / total_;
        double centre = share * kSample, margin = 5 * __builtin_sqrt(kSample * share * (1 - share)) + 5;
        int64_t first = static_cast<int64_t>(centre - margin), last = static_cast<int64_t>(centre + margin) + 1;
        uint32_t ends[2] = {0, kLargest};
        parallel_for(threads_, 2, 1, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) {
                int64_t place = i ? last : first;
                if (place < 1 || place > kSample) continue;
                uint32_t* copy = sample_ + (i + 1) * kSample;
                std::memcpy(copy, sample_, kSample * sizeof *copy);
                ends[i] = narrow_list(copy, kSample, {0, kLargest, place}, part_counts(i)).value;
            }
        });
        return {ends[0], ends[1], rank};
    }

    // Fills the parts' lists and makes the range's rank relative to it; false if it misses the rank or overflows.
    bool collect(Range& range) {
        parallel_for(threads_, parts_count_, 1, [&](int64_t begin, int64_t end, int) {
            for (int64_t p = begin; p < end; ++p) {
                Part& part = parts_[p];
                part.below = part.length = 0;
                for (int64_t row = part.begin; row < part.end && part.length <= part.capacity; ++row)
                    part.length = collect_row(matrix_, row, range, &part.below, part.list, part.length, part.capacity);
            }
        });
        int64_t below = 0, inside = 0;
        for (int64_t p = 0; p < parts_count_; ++p) {
            if (parts_[p].length > parts_[p].capacity) return false;
            below += parts_[p].below;
            inside += parts_[p].length;
        }
        range.rank -= below;
        return range.rank >= 1 && range.rank <= inside;
    }

    // As collect, for a range whose rank is relative to it already.
    bool collect_within(Range& range) {
        int64_t rank = range.rank;
        collect(range);
        range.rank = rank;
        for (int64_t p = 0; p < parts_count_; ++p)
            if (parts_[p].length > parts_[p].capacity) return false;
        return true;
    }

    int64_t* part_counts(int64_t p) { return counts_ + (p + 1) * kBins; }

    int64_t narrow(Range& range) {
        std::memset(counts_, 0, kBins * sizeof *counts_);
        for (int64_t p = 0; p < parts_count_; ++p)
            for (int bin = 0; bin < kBins; ++bin) counts_[bin] += part_counts(p)[bin];
        return range.narrow(counts_);
    }

    int64_t histogram(Range& range) {
        parallel_for(threads_, parts_count_, 1, [&](int64_t begin, int64_t end, int) {
            for (int64_t p = begin; p < end; ++p) {
                std::memset(part_counts(p), 0, kBins * sizeof *counts_);
                for (int64_t row = parts_[p].begin; row < parts_[p].end; ++row)
                    histogram_row(matrix_, row, range, part_counts(p));
            }
        });
        return narrow(range);
    }

    // The range narrowed to one value within the lists: once by all threads, which leaves little, then by this one.
    Threshold narrow_parts(Range range) {
        range.shift_used = range.shift();
        parallel_for(threads_, parts_count_, 1, [&](int64_t begin, int64_t end, int) {
            for (int64_t p = begin; p < end; ++p) {
                std::memset(part_counts(p), 0, kBins * sizeof *counts_);
                count_list(parts_[p].list, parts_[p].length, range, part_counts(p));
            }
        });
        int64_t inside = narrow(range);
        if (range.shift_used == 0) return {range.low, inside, range.rank};
        parallel_for(threads_, parts_count_, 1, [&](int64_t begin, int64_t end, int) {
            for (int64_t p = begin; p < end; ++p)
                parts_[p].length = keep_inside(parts_[p].list, parts_[p].length, range);
        });
        int64_t length = 0;
        for (int64_t p = 0; p < parts_count_; ++p) {
            std::memmove(parts_[0].list + length, parts_[p].list, parts_[p].length * sizeof(uint32_t));
            length += parts_[p].length;
        }
        return narrow_list(parts_[0].list, length, range, counts_);
    }

    Matrix matrix_;
    int threads_;
    int64_t parts_count_, total_;
    int64_t share_;  // the lists hold up to one in so many scores
    Workspace parts_space_, counts_space_, lists_space_;
    Part* parts_;
    int64_t* counts_;
    uint32_t* sample_;
};

// Writes a row's mask: scores below the threshold, and of its equals the first `ties`. Returns how many were taken.
int64_t write_row(const float* weights, const float* norms, int64_t columns, uint32_t threshold, int64_t ties,
                  uint8_t* mask) {
    int64_t taken = 0, j = 0;
    if (ties == 0 || ties >= columns) {
        uint32_t bound = threshold + (ties != 0);
#if defined(__AVX512F__)
        for (; j + kStep <= columns; j += kStep) {
            __mmask16 less = _mm512_cmplt_epu32_mask(scores(0xffff, weights + j, norms + j), _mm512_set1_epi32(bound));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(mask + j), _mm_maskz_set1_epi8(less, 1));
            taken += __builtin_popcount(less);
        }
#endif
        for (; j < columns; ++j) {
            mask[j] = score(weights[j], norms[j]) < bound;
            taken += mask[j];
        }
        return taken;
    }
    for (; j < columns; ++j) {
        uint32_t bits = score(weights[j], norms[j]);
        bool tie = bits == threshold && ties > 0;
        ties -= tie;
        mask[j] = bits < threshold || tie;
        taken += mask[j];
    }
    return taken;
}

int64_t count_equal(const float* weights, const float* norms, int64_t columns, uint32_t value) {
    int64_t equal = 0;
    for (int64_t j = 0; j < columns; ++j) equal += score(weights[j], norms[j]) == value;
    return equal;
}

// Of the first `width` columns, the scores below the threshold and the first of its equals in flat order.
void write_mask(const Matrix& matrix, const Threshold& threshold, int64_t width, uint8_t* mask, int64_t* taken,
                int threads) {
    int64_t rows = matrix.rows, columns = matrix.columns;
    Workspace space(2 * rows * sizeof(int64_t));
    int64_t* ties = reinterpret_cast<int64_t*>(space.data());
    int64_t* row_taken = ties + rows;
    bool all_ties = threshold.wanted == threshold.ties;
    int64_t grain = maximum(1, 65536 / maximum(columns, 1));
    if (!all_ties) {
        parallel_for(threads, rows, grain, [&](int64_t begin, int64_t end, int) {
            for (int64_t row = begin; row < end; ++row)
                ties[row] = count_equal(matrix.row(row), matrix.norms, columns, threshold.value);
        });
        int64_t left = threshold.wanted;
        for (int64_t row = 0; row < rows; ++row) {
            int64_t here = minimum(ties[row], left);
            left -= here;
            ties[row] = here == ties[row] && here > 0 ? columns : here;
        }
    }
    parallel_for(threads, rows, grain, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            const float* later = matrix.row(minimum(row + kRowsAhead, rows - 1));
            for (int64_t j = 0; j < width; j += 16) __builtin_prefetch(later + j);
            row_taken[row] = write_row(matrix.row(row), matrix.norms, width, threshold.value,
                                       all_ties ? columns : ties[row], mask + row * width);
        }
    });
    *taken = 0;
    for (int64_t row = 0; row < rows; ++row) *taken += row_taken[row];
}

}  // namespace

void select_smallest(const float* weights, int64_t stride, const float* norms, int64_t rows, int64_t columns,
                     int64_t count, int64_t width, uint8_t* mask, int64_t* taken, int threads) {
    Matrix matrix{weights, stride, norms, rows, columns};
    if (count == 0) {
        *taken = 0;
        std::memset(mask, 0, rows * width);
        return;
    }
    write_mask(matrix, Selector(matrix, threads).find(count), width, mask, taken, threads);
}

// A digit is `bits` wide and has `shift` bits below it; counted are the scores whose bits above it are `prefix`.
void count_scores(const float* weights, int64_t stride, const float* norms, int64_t rows, int64_t columns,
                  int64_t prefix, int64_t shift, int64_t bits, int64_t* counts, int threads) {
    Matrix matrix{weights, stride, norms, rows, columns};
    int64_t bins = int64_t{1} << bits, grain = maximum(1, 65536 / maximum(columns, 1));
    uint32_t low = static_cast<uint32_t>(prefix) << (shift + bits);
    Range range{low, low + ((1u << (shift + bits)) - 1), 0};
    range.shift_used = static_cast<int>(shift);
    Workspace space(threads * bins * sizeof(int64_t));
    int64_t* own = reinterpret_cast<int64_t*>(space.data());
    std::memset(own, 0, threads * bins * sizeof(int64_t));
    parallel_for(threads, rows, grain, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t row = begin; row < end; ++row) histogram_row(matrix, row, range, own + worker * bins);
    });
    std::memset(counts, 0, bins * sizeof(int64_t));
    for (int worker = 0; worker < threads; ++worker)
        for (int64_t bin = 0; bin < bins; ++bin) counts[bin] += own[worker * bins + bin];
}

void select_below(const float* weights, int64_t stride, const float* norms, int64_t rows, int64_t columns,
                  int64_t threshold, int64_t ties, int64_t width, uint8_t* mask, int64_t* taken, int threads) {
    Matrix matrix{weights, stride, norms, rows, columns};
    write_mask(matrix, {static_cast<uint32_t>(threshold), rows * columns + 1, ties}, width, mask, taken, threads);
}

void select_per_row(const float* weights, int64_t stride, const float* norms, int64_t rows, int64_t columns,
                    int64_t count, uint8_t* mask, int threads) {
    if (count == 0) {
        std::memset(mask, 0, rows * columns);
        return;
    }
    size_t list_bytes = columns * sizeof(uint32_t), bytes = (list_bytes + kBins * sizeof(int64_t) + 64) / 64 * 64;
    Workspace space(bytes * threads);
    int64_t grain = maximum(1, 16384 / columns);
    parallel_for(threads, rows, grain, [&](int64_t begin, int64_t end, int worker) {
        int64_t* counts = reinterpret_cast<int64_t*>(space.data() + worker * bytes);
        uint32_t* list = reinterpret_cast<uint32_t*>(counts + kBins);
        for (int64_t row = begin; row < end; ++row) {
            const float* source = weights + row * stride;
            uint32_t low = kLargest, high = 0;
            for (int64_t j = 0; j < columns; ++j) {
                list[j] = score(source[j], norms[j]);
                low = list[j] < low ? list[j] : low;
                high = list[j] > high ? list[j] : high;
            }
            Threshold threshold = narrow_list(list, columns, {low, high, count}, counts);
            int64_t ties = threshold.wanted == threshold.ties ? columns : threshold.wanted;
            write_row(source, norms, columns, threshold.value, ties, mask + row * columns);
        }
    });
}

}  // namespace thanos::THANOS_ISA
