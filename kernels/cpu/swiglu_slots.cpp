// SwiGLU experts on a CPU: `weight * w2 (silu(w1 x) * (w3 x))` of rows that are sorted by slot, and the backward pass.
//
// Compiled when it is first used, see build.py. The matrix products are torch's own, called through its C interface
// (torch/csrc/inductor/aoti_torch and torch/csrc/stable), whose functions come with the call; so are the threads. Slots
// go to single threads, whose small products are faster than those that all threads share and wait for each other
// after; slots too full for that come first and are shared. bfloat16 comes as its 16 bits. What stands between the
// products reads every element once, is computed in float32 and rounded once.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "threads.h"

using Handle = void*;

// Fields and their order are those of `_Call` in swiglu_slots.py. Matrices are contiguous; s slots, N rows, D, F.
struct Call {
    int32_t (*create)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t, Handle*);
    int32_t (*destroy)(Handle);
    int32_t (*mm_out)(Handle, Handle, Handle);
    int32_t (*addmm_out)(Handle, Handle, Handle, Handle, double, double);
    ParallelFor parallel_for;
    const char* (*what)();  // the last error of this thread
    int32_t dtype, device;  // torch's codes
    int64_t slots, hidden, inner;  // s, D, F
    const int64_t* first_row;      // [s + 1]
    const int64_t* order;          // [s] all slots, the fullest first
    int64_t shared;                // so many of them are computed by all threads together
    int64_t threads;
    void* buffers;     // `num_buffers` [n, stride] of every slot that is computed at the same time
    int64_t num_buffers, stride;
    void *rows, *row_weights, *w1, *w3, *w2;  // [N, D], [N] float32, [s, F, D], [s, F, D], [s, D, F]
    void *gate, *up;                          // [N, F]; null forwards with 3 buffers, which hold them then
    void* out;                                // [N, D]
    void *grad, *grad_rows, *grad_weights;    // [N, D], [N, D], [N]
    void *grad1, *grad3, *grad2;              // as w1, w3, w2; null where nobody wants it
    char error[256];                          // empty, or why torch could not compute a product
};

namespace {

float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float load(float value) { return value; }
float load(uint16_t bits) { return bits_to_float(uint32_t{bits} << 16); }

void store(float value, float* place) { *place = value; }
void store(float value, uint16_t* place) {
    uint32_t bits = float_to_bits(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    *place = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

// e^x to about a unit in the last place; at least e^-87, and infinite above e^88. A polynomial instead of std::exp, which
// compilers do not vectorise everywhere.
float exponential(float x) {
    const bool is_huge = x > 88.0f;
    x = x < -87.0f ? -87.0f : x;
    x = is_huge ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p *= bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
    return is_huge ? __builtin_inff() : p;
}

float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Below, rows of matrices are `..._stride` elements apart.

template <typename T>
void weighted_swiglu(const T* gate, const T* up, int64_t gate_stride, const float* weights, T* product,
                     int64_t product_stride, int64_t first, int64_t last, int64_t width) {
    for (int64_t row = first; row < last; ++row) {
        const T* a_row = gate + row * gate_stride;
        const T* b_row = up + row * gate_stride;
        T* out = product + row * product_stride;
        const float weight = weights[row];
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            const float a = load(a_row[i]);
            store(a * sigmoid(a) * load(b_row[i]) * weight, out + i);
        }
    }
}

// On entry grad_up holds the gradient of the weighted product.
template <typename T>
void weighted_swiglu_backward(const T* gate, const T* up, int64_t gate_stride, const float* weights, T* grad_gate,
                              T* grad_up, float* grad_weights, T* product, int64_t stride, int64_t first, int64_t last,
                              int64_t width) {
    for (int64_t row = first; row < last; ++row) {
        const T* a_row = gate + row * gate_stride;
        const T* b_row = up + row * gate_stride;
        T* ga_row = grad_gate + row * stride;
        T* gb_row = grad_up + row * stride;
        T* out = product + row * stride;
        const float weight = weights[row];
        float total = 0.0f;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < width; ++i) {
            const float a = load(a_row[i]), b = load(b_row[i]), g = load(gb_row[i]);
            const float share = sigmoid(a), silu = a * share, plain = silu * b, weighted = g * weight;
            total += g * plain;
            store(plain * weight, out + i);
            store(weighted * b * (share * (1.0f + a * (1.0f - share))), ga_row + i);
            store(weighted * silu, gb_row + i);
        }
        grad_weights[row] = total;
    }
}

// A matrix of torch's over memory of ours.
class Matrix {
   public:
    Matrix(const Call& call, void* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride)
        : call_(call) {
        const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
        if (call.create(data, 2, sizes, strides, 0, call.dtype, call.device, 0, &handle) != 0) handle = nullptr;
    }
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;
    ~Matrix() {
        if (handle != nullptr) call_.destroy(handle);
    }

    Handle handle = nullptr;

   private:
    const Call& call_;
};

template <typename T>
class Slots {
   public:
    explicit Slots(Call& call) : call_(call) { call.error[0] = 0; }

    // `compute(slot, buffers, is_shared)` of every slot. Returns 0, or 1 with the reason in the call's `error`.
    template <typename Compute>
    int for_each(Compute compute) {
        T* buffers = static_cast<T*>(call_.buffers);
        for (int64_t i = 0; i < call_.shared; ++i) compute(call_.order[i], buffers, true);

        // A lane takes one slot after another. Its first is its fullest, and its buffers have the size of that one.
        const int64_t lanes = std::min(call_.threads, call_.slots - call_.shared);
        std::atomic<int64_t> next{call_.shared + lanes};
        const auto run = [&](int64_t first_lane, int64_t last_lane) {
            for (int64_t lane = first_lane; lane < last_lane; ++lane) {
                const int64_t first = call_.shared + lane;
                T* own = buffers;
                for (int64_t i = call_.shared; i < first; ++i)
                    own += call_.num_buffers * num_rows(call_.order[i]) * call_.stride;
                for (int64_t i = first; i < call_.slots; i = next++) compute(call_.order[i], own, false);
            }
        };
        check(for_ranges(call_.parallel_for, lanes, 1, run) == 0);
        return has_failed_;
    }

    // `compute(first, last)` of the rows 0 to n; on all threads if the slot is shared and they are worth waking.
    template <typename Compute>
    void for_rows(int64_t n, bool is_shared, Compute compute) {
        const int64_t values_per_thread = 1 << 14;
        if (is_shared)
            check(for_ranges(call_.parallel_for, n, values_per_thread / call_.inner + 1, compute) == 0);
        else
            compute(0, n);
    }

    int64_t num_rows(int64_t slot) const { return call_.first_row[slot + 1] - call_.first_row[slot]; }

    // Rows of a slot in a matrix of all rows, and a slot's own matrix.
    T* of_rows(void* matrix, int64_t slot, int64_t width) const {
        return static_cast<T*>(matrix) + call_.first_row[slot] * width;
    }
    T* of_slot(void* matrices, int64_t slot) const {
        return static_cast<T*>(matrices) + slot * call_.inner * call_.hidden;
    }
    float* of_weights(void* values, int64_t slot) const { return static_cast<float*>(values) + call_.first_row[slot]; }

    void multiply(const Matrix& left, const Matrix& right, const Matrix& into) {
        const bool are_there = left.handle != nullptr && right.handle != nullptr && into.handle != nullptr;
        check(are_there && call_.mm_out(into.handle, left.handle, right.handle) == 0);
    }
    void add_product(const Matrix& left, const Matrix& right, const Matrix& to) {
        const bool are_there = left.handle != nullptr && right.handle != nullptr && to.handle != nullptr;
        check(are_there && call_.addmm_out(to.handle, to.handle, left.handle, right.handle, 1.0, 1.0) == 0);
    }

   private:
    void check(bool is_well) {
        if (!is_well && has_failed_.exchange(1) == 0) {
            std::strncpy(call_.error, call_.what(), sizeof call_.error - 1);
            call_.error[sizeof call_.error - 1] = 0;
        }
    }

    Call& call_;
    std::atomic<int> has_failed_{0};
};

template <typename T>
int forward(Call& call) {
    Slots<T> slots(call);
    const int64_t D = call.hidden, F = call.inner, stride = call.stride;
    const bool keeps = call.num_buffers == 1;
    return slots.for_each([&](int64_t slot, T* buffers, bool is_shared) {
        const int64_t n = slots.num_rows(slot);
        if (n == 0) return;
        T* inner = buffers;
        T* gate = keeps ? slots.of_rows(call.gate, slot, F) : buffers + n * stride;
        T* up = keeps ? slots.of_rows(call.up, slot, F) : buffers + 2 * n * stride;
        const int64_t gate_stride = keeps ? F : stride;
        const float* weights = slots.of_weights(call.row_weights, slot);

        const Matrix x(call, slots.of_rows(call.rows, slot, D), n, D, D, 1);
        const Matrix a(call, gate, n, F, gate_stride, 1), b(call, up, n, F, gate_stride, 1);
        slots.multiply(x, Matrix(call, slots.of_slot(call.w1, slot), D, F, 1, D), a);
        slots.multiply(x, Matrix(call, slots.of_slot(call.w3, slot), D, F, 1, D), b);
        slots.for_rows(n, is_shared, [&](int64_t first, int64_t last) {
            weighted_swiglu(gate, up, gate_stride, weights, inner, stride, first, last, F);
        });
        slots.multiply(Matrix(call, inner, n, F, stride, 1), Matrix(call, slots.of_slot(call.w2, slot), F, D, 1, F),
                       Matrix(call, slots.of_rows(call.out, slot, D), n, D, D, 1));
    });
}

template <typename T>
int backward(Call& call) {
    Slots<T> slots(call);
    const int64_t D = call.hidden, F = call.inner, stride = call.stride;
    return slots.for_each([&](int64_t slot, T* buffers, bool is_shared) {
        const int64_t n = slots.num_rows(slot);
        if (n == 0) {
            for (void* gradient : {call.grad1, call.grad3, call.grad2})
                if (gradient != nullptr) std::memset(slots.of_slot(gradient, slot), 0, D * F * sizeof(T));
            return;
        }
        T *inner = buffers, *grad_gate = buffers + n * stride, *grad_up = buffers + 2 * n * stride;
        T* grad = slots.of_rows(call.grad, slot, D);
        const T *gate = slots.of_rows(call.gate, slot, F), *up = slots.of_rows(call.up, slot, F);
        const float* weights = slots.of_weights(call.row_weights, slot);
        float* grad_weights = slots.of_weights(call.grad_weights, slot);
        const Matrix x(call, slots.of_rows(call.rows, slot, D), n, D, D, 1);
        const Matrix ga(call, grad_gate, n, F, stride, 1), gb(call, grad_up, n, F, stride, 1);

        slots.multiply(Matrix(call, grad, n, D, D, 1), Matrix(call, slots.of_slot(call.w2, slot), D, F, F, 1), gb);
        slots.for_rows(n, is_shared, [&](int64_t first, int64_t last) {
            weighted_swiglu_backward(gate, up, F, weights, grad_gate, grad_up, grad_weights, inner, stride, first, last,
                                     F);
        });
        if (call.grad2 != nullptr)
            slots.multiply(Matrix(call, grad, D, n, 1, D), Matrix(call, inner, n, F, stride, 1),
                           Matrix(call, slots.of_slot(call.grad2, slot), D, F, F, 1));
        if (call.grad1 != nullptr)
            slots.multiply(Matrix(call, grad_gate, F, n, 1, stride), x,
                           Matrix(call, slots.of_slot(call.grad1, slot), F, D, D, 1));
        if (call.grad3 != nullptr)
            slots.multiply(Matrix(call, grad_up, F, n, 1, stride), x,
                           Matrix(call, slots.of_slot(call.grad3, slot), F, D, D, 1));
        const Matrix gx(call, slots.of_rows(call.grad_rows, slot, D), n, D, D, 1);
        slots.multiply(ga, Matrix(call, slots.of_slot(call.w1, slot), F, D, D, 1), gx);
        slots.add_product(gb, Matrix(call, slots.of_slot(call.w3, slot), F, D, D, 1), gx);
    });
}

}  // namespace

#define DEFINE(suffix, T)                                                                   \
    extern "C" int swiglu_slots_##suffix(Call* call) { return forward<T>(*call); }          \
    extern "C" int swiglu_slots_backward_##suffix(Call* call) { return backward<T>(*call); }

DEFINE(float32, float)
DEFINE(bfloat16, uint16_t)
