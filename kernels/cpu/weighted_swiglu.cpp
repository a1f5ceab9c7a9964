// silu(gate) * up * weight and its backward pass for callers that have gate and up.

#include "weighted_swiglu.h"

#define DEFINE(suffix, T)                                                                                             \
    extern "C" void weighted_swiglu_##suffix(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride,      \
                                             const float* weights, T* product, int64_t product_stride, int64_t rows,  \
                                             int64_t width, int threads) {                                            \
        swiglu::forward(gate, gate_stride, up, up_stride, weights, product, product_stride, rows, width, threads);    \
    }                                                                                                                 \
    extern "C" void weighted_swiglu_backward_##suffix(                                                                \
        const T* grad, int64_t grad_stride, const T* gate, int64_t gate_stride, const T* up, int64_t up_stride,       \
        const float* weights, T* grad_gate, int64_t grad_gate_stride, T* grad_up, int64_t grad_up_stride,             \
        float* grad_weights, T* product, int64_t product_stride, int64_t rows, int64_t width, int threads) {          \
        swiglu::backward(grad, grad_stride, gate, gate_stride, up, up_stride, weights, grad_gate, grad_gate_stride,   \
                         grad_up, grad_up_stride, grad_weights, product, product_stride, rows, width, threads);       \
    }

DEFINE(float32, float)
DEFINE(bfloat16, uint16_t)
