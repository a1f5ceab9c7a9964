// SwiGLU experts on a CPU: `weight * w2 (silu(w1 x) * (w3 x))` of rows that are sorted by slot, and the backward pass.
//
// The matrix products are torch's own, called through its C interface (torch/csrc/inductor/aoti_torch), whose functions
// come with the call. Slots go to single threads, whose small products are faster than those that all threads share and
// wait for each other after; slots too large for that come first and are computed by all threads together.

#include <atomic>
#include <cstring>
#include <initializer_list>

#include "weighted_swiglu.h"

#include <omp.h>

using Handle = void*;

// Fields and their order are those of `_Call` in swiglu_slots.py. Matrices are contiguous; s slots, N rows, D, F.
struct Call {
    int32_t (*create)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t, Handle*);
    int32_t (*destroy)(Handle);
    int32_t (*mm_out)(Handle, Handle, Handle);
    int32_t (*addmm_out)(Handle, Handle, Handle, Handle, double, double);
    int32_t dtype, device;          // torch's codes
    int64_t slots, hidden, inner;   // s, D, F
    const int64_t* first_row;       // [s + 1]
    const int64_t* order;           // [s] all slots, the fullest first
    int64_t together;               // so many of them are computed by all threads
    int64_t threads;
    void *rows, *row_weights, *w1, *w3, *w2;     // [N, D], [N] float32, [s, F, D], [s, F, D], [s, D, F]
    void *gate, *up;                             // [N, F]; null: kept for no longer than a slot takes
    void* buffers;                               // for one slot at a time on every thread
    int64_t stride;                              // elements from one row of a buffer to the next
    void* out;                                   // [N, D]
    void *grad, *grad_rows, *grad_weights;       // [N, D], [N, D], [N]
    void *grad1, *grad3, *grad2;                 // as w1, w3, w2; null where nobody wants it
};

namespace {

// A matrix of torch's over memory of ours.
class Matrix {
   public:
    template <typename T>
    Matrix(const Call& call, T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride)
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
    explicit Slots(const Call& call) : call_(call) {}

    // Returns 0, or 1 if torch could not compute a product, which it has said why on stderr.
    template <typename Compute>
    int for_each(int buffers_per_slot, Compute compute) {
        T* buffers = static_cast<T*>(call_.buffers);
        for (int64_t i = 0; i < call_.together; ++i)
            compute(call_.order[i], buffers, static_cast<int>(call_.threads));
        if (call_.together == call_.slots) return failed_;
        std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(call_.threads))
        {
            // A thread's first slot is its fullest, and its buffers have the size of that one.
            const int64_t first = call_.together + omp_get_thread_num();
            T* own = buffers;
            for (int64_t i = call_.together; i < first && i < call_.slots; ++i)
                own += buffers_per_slot * num_rows(call_.order[i]) * call_.stride;
#pragma omp single
            next = call_.together + omp_get_num_threads();
            for (int64_t i = first; i < call_.slots; i = next++) compute(call_.order[i], own, 1);
        }
        return failed_;
    }

    int64_t num_rows(int64_t slot) const { return call_.first_row[slot + 1] - call_.first_row[slot]; }

    // Rows of a slot in a matrix of all rows, and a slot's own matrix.
    T* of_rows(void* matrix, int64_t slot, int64_t width) const {
        return static_cast<T*>(matrix) + call_.first_row[slot] * width;
    }
    T* of_slot(void* matrices, int64_t slot) const {
        return static_cast<T*>(matrices) + slot * call_.inner * call_.hidden;
    }
    float* weights(void* values, int64_t slot) const { return static_cast<float*>(values) + call_.first_row[slot]; }

    void multiply(const Matrix& left, const Matrix& right, const Matrix& into) {
        const bool is_whole = left.handle != nullptr && right.handle != nullptr && into.handle != nullptr;
        if (!is_whole || call_.mm_out(into.handle, left.handle, right.handle) != 0) failed_ = 1;
    }
    void add_product(const Matrix& left, const Matrix& right, const Matrix& to) {
        const bool is_whole = left.handle != nullptr && right.handle != nullptr && to.handle != nullptr;
        if (!is_whole || call_.addmm_out(to.handle, to.handle, left.handle, right.handle, 1.0, 1.0) != 0) failed_ = 1;
    }

   private:
    const Call& call_;
    std::atomic<int> failed_{0};
};

template <typename T>
int forward(const Call& call) {
    Slots<T> slots(call);
    const int64_t D = call.hidden, F = call.inner, stride = call.stride;
    const bool keeps = call.gate != nullptr;
    return slots.for_each(keeps ? 1 : 3, [&](int64_t slot, T* buffers, int threads) {
        const int64_t n = slots.num_rows(slot);
        if (n == 0) return;
        T* inner = buffers;
        T* gate = keeps ? slots.of_rows(call.gate, slot, F) : buffers + n * stride;
        T* up = keeps ? slots.of_rows(call.up, slot, F) : buffers + 2 * n * stride;
        const int64_t kept_stride = keeps ? F : stride;

        const Matrix x(call, slots.of_rows(call.rows, slot, D), n, D, D, 1);
        const Matrix a(call, gate, n, F, kept_stride, 1), b(call, up, n, F, kept_stride, 1);
        slots.multiply(x, Matrix(call, slots.of_slot(call.w1, slot), D, F, 1, D), a);
        slots.multiply(x, Matrix(call, slots.of_slot(call.w3, slot), D, F, 1, D), b);
        swiglu::forward(gate, kept_stride, up, kept_stride, slots.weights(call.row_weights, slot), inner, stride, n, F,
                        threads);
        slots.multiply(Matrix(call, inner, n, F, stride, 1), Matrix(call, slots.of_slot(call.w2, slot), F, D, 1, F),
                       Matrix(call, slots.of_rows(call.out, slot, D), n, D, D, 1));
    });
}

template <typename T>
int backward(const Call& call) {
    Slots<T> slots(call);
    const int64_t D = call.hidden, F = call.inner, stride = call.stride;
    return slots.for_each(3, [&](int64_t slot, T* buffers, int threads) {
        const int64_t n = slots.num_rows(slot);
        if (n == 0) {
            for (void* gradient : {call.grad1, call.grad3, call.grad2})
                if (gradient != nullptr) std::memset(slots.of_slot(gradient, slot), 0, D * F * sizeof(T));
            return;
        }
        T *inner = buffers, *grad_gate = buffers + n * stride, *grad_up = buffers + 2 * n * stride;
        T* grad = slots.of_rows(call.grad, slot, D);
        const Matrix x(call, slots.of_rows(call.rows, slot, D), n, D, D, 1), g(call, grad, n, D, D, 1);
        const Matrix ga(call, grad_gate, n, F, stride, 1), gb(call, grad_up, n, F, stride, 1);

        // First the gradient of the weighted product, in the place of that of up.
        slots.multiply(g, Matrix(call, slots.of_slot(call.w2, slot), D, F, F, 1), gb);
        swiglu::backward(grad_up, stride, slots.of_rows(call.gate, slot, F), F, slots.of_rows(call.up, slot, F), F,
                         slots.weights(call.row_weights, slot), grad_gate, stride, grad_up, stride,
                         slots.weights(call.grad_weights, slot), inner, stride, n, F, threads);
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

#define DEFINE(suffix, T)                                                                                        \
    extern "C" int swiglu_slots_##suffix(const Call* call) { return forward<T>(*call); }                         \
    extern "C" int swiglu_slots_backward_##suffix(const Call* call) { return backward<T>(*call); }

DEFINE(float32, float)
DEFINE(bfloat16, uint16_t)
