// Kernels of the operations that no CUDA library offers; the CPU code of the same name is the oracle of each.
//
// Compiled at run time, once for each element type: the host puts `typedef float T;` (or double) and the names EXP and
// LOG of that type in front. No header is needed, and no atomic: every element is gathered by one thread, every sum has
// a fixed order, so results repeat bit for bit. Tensors are contiguous, of fewer than 2^31 elements; the host checks.

typedef unsigned int u32;
typedef unsigned long long u64;

// Threads of a block that sums together; a power of two.
#define BLOCK 512

// One thread an element.
#define ELEMENT(i, len)                          \
    u32 i = blockIdx.x * blockDim.x + threadIdx.x; \
    if (i >= (len)) return

extern "C" __global__ void rectify(u32 len, T ceiling, const T* x, T* out) {
    ELEMENT(i, len);
    // Comparisons with NaN are false, so that NaN takes the last branch and passes.
    T floored = x[i] <= T(0) ? T(0) : x[i];
    out[i] = floored >= ceiling ? ceiling : floored;
}

// From the result alone; `ceiling` is NaN where there is none, so that even an infinite result keeps its gradient.
extern "C" __global__ void rectify_grad(u32 len, T ceiling, const T* result, const T* grad, T* out) {
    ELEMENT(i, len);
    out[i] = result[i] <= T(0) || result[i] >= ceiling ? T(0) : grad[i];
}

// Bit i of `keep` says whether element i stays; forward and backward of dropout alike.
extern "C" __global__ void keep_scaled(u32 len, T scale, const u64* keep, const T* x, T* out) {
    ELEMENT(i, len);
    out[i] = keep[i / 64] >> (i % 64) & 1 ? x[i] * scale : T(0);
}

// out = a * out + b * x + c * y. A factor of 0 leaves its term out, whatever it holds.
extern "C" __global__ void combine(u32 len, T a, T b, T c, const T* x, const T* y, T* out) {
    ELEMENT(i, len);
    T sum = a == T(0) ? T(0) : a * out[i];
    if (b != T(0)) sum = sum + b * x[i];
    if (c != T(0)) sum = sum + c * y[i];
    out[i] = sum;
}

// Window, step and padding of a pooling; Rust passes the same struct.
struct Pool {
    u32 h, w, oh, ow, kh, kw, sh, sw, ph, pw;
};

// Maxima, and where they lie in their plane; a null `out` or `place` is not written. The first of equals wins, a NaN
// always. Padding never exceeds half the window, so that no window lies in the padding alone.
extern "C" __global__ void max_pool(u32 len, Pool p, T lowest, const T* x, T* out, u32* place) {
    ELEMENT(i, len);
    u32 ox = i % p.ow, oy = i / p.ow % p.oh;
    const T* map = x + (size_t)(i / (p.ow * p.oh)) * p.h * p.w;
    u32 top = oy * p.sh > p.ph ? oy * p.sh - p.ph : 0, left = ox * p.sw > p.pw ? ox * p.sw - p.pw : 0;
    u32 bottom = oy * p.sh + p.kh - p.ph, right = ox * p.sw + p.kw - p.pw;
    bottom = bottom < p.h ? bottom : p.h;
    right = right < p.w ? right : p.w;
    // A window of nothing but minus infinity gives its gradient to its first element.
    T best = lowest;
    u32 at = top * p.w + left;
    for (u32 y = top; y < bottom; ++y)
        for (u32 x = left; x < right; ++x) {
            T v = map[y * p.w + x];
            if (v > best || v != v) {
                best = v;
                at = y * p.w + x;
            }
        }
    if (out) out[i] = best;
    if (place) place[i] = at;
}

// An input element gathers the gradients of the windows whose maximum it is.
extern "C" __global__ void max_pool_grad(u32 len, Pool p, const u32* place, const T* grad, T* dx) {
    ELEMENT(i, len);
    u32 x = i % p.w, y = i / p.w % p.h;
    size_t plane = (size_t)(i / (p.w * p.h)) * p.oh * p.ow;
    u32 last_y = (y + p.ph) / p.sh, last_x = (x + p.pw) / p.sw;
    u32 end_y = last_y < p.oh ? last_y + 1 : p.oh, end_x = last_x < p.ow ? last_x + 1 : p.ow;
    u32 first_y = y + p.ph >= p.kh ? (y + p.ph - p.kh) / p.sh + 1 : 0;
    u32 first_x = x + p.pw >= p.kw ? (x + p.pw - p.kw) / p.sw + 1 : 0;
    T sum = T(0);
    for (u32 oy = first_y; oy < end_y; ++oy)
        for (u32 ox = first_x; ox < end_x; ++ox) {
            size_t o = plane + oy * p.ow + ox;
            if (place[o] == y * p.w + x) sum = sum + grad[o];
        }
    dx[i] = sum;
}

// Heights and widths of a map before and after.
struct Grid {
    u32 h, w, oh, ow;
};

// Means over rectangles; `rows` and `cols` hold (start, end, divisor) of each bin.
extern "C" __global__ void mean_pool(u32 len, Grid g, const u32* rows, const u32* cols, const T* x, T* out) {
    ELEMENT(i, len);
    const u32 *row = rows + 3 * (i / g.ow % g.oh), *col = cols + 3 * (i % g.ow);
    const T* map = x + (size_t)(i / (g.ow * g.oh)) * g.h * g.w;
    double sum = 0;
    for (u32 y = row[0]; y < row[1]; ++y)
        for (u32 x = col[0]; x < col[1]; ++x) sum += (double)map[y * g.w + x];
    out[i] = T(sum / ((double)row[2] * (double)col[2]));
}

// `row_range` and `col_range` hold, for each input row and column, the bins (first, end) that may cover it.
extern "C" __global__ void mean_pool_grad(u32 len, Grid g, const u32* rows, const u32* cols, const u32* row_range,
                                          const u32* col_range, const T* grad, T* dx) {
    ELEMENT(i, len);
    u32 x = i % g.w, y = i / g.w % g.h;
    const T* map = grad + (size_t)(i / (g.w * g.h)) * g.oh * g.ow;
    double sum = 0;
    for (u32 oy = row_range[2 * y]; oy < row_range[2 * y + 1]; ++oy) {
        const u32* row = rows + 3 * oy;
        if (y < row[0] || y >= row[1]) continue;
        for (u32 ox = col_range[2 * x]; ox < col_range[2 * x + 1]; ++ox) {
            const u32* col = cols + 3 * ox;
            if (x < col[0] || x >= col[1]) continue;
            sum += (double)map[oy * g.ow + ox] / ((double)row[2] * (double)col[2]);
        }
    }
    dx[i] = T(sum);
}

// `rows` and `cols` hold the two neighbours (low, high) of each output, the weights beside them.
extern "C" __global__ void bilinear(u32 len, Grid g, const u32* rows, const T* row_weights, const u32* cols,
                                    const T* col_weights, const T* x, T* out) {
    ELEMENT(i, len);
    u32 ox = i % g.ow, oy = i / g.ow % g.oh;
    const T* map = x + (size_t)(i / (g.ow * g.oh)) * g.h * g.w;
    const T *low = map + rows[2 * oy] * g.w, *high = map + rows[2 * oy + 1] * g.w;
    u32 a = cols[2 * ox], b = cols[2 * ox + 1];
    T wa = col_weights[2 * ox], wb = col_weights[2 * ox + 1];
    T l = low[a] * wa + low[b] * wb, h = high[a] * wa + high[b] * wb;
    out[i] = l * row_weights[2 * oy] + h * row_weights[2 * oy + 1];
}

// Weight that output `o` of an axis gives input `at`: both neighbours may be the same pixel at the border.
static __device__ T weight_of(const u32* taps, const T* weights, u32 o, u32 at) {
    T low = taps[2 * o] == at ? weights[2 * o] : T(0);
    T high = taps[2 * o + 1] == at ? weights[2 * o + 1] : T(0);
    return low + high;
}

extern "C" __global__ void bilinear_grad(u32 len, Grid g, const u32* rows, const T* row_weights, const u32* cols,
                                         const T* col_weights, const u32* row_range, const u32* col_range,
                                         const T* grad, T* dx) {
    ELEMENT(i, len);
    u32 x = i % g.w, y = i / g.w % g.h;
    const T* map = grad + (size_t)(i / (g.w * g.h)) * g.oh * g.ow;
    T sum = T(0);
    for (u32 oy = row_range[2 * y]; oy < row_range[2 * y + 1]; ++oy) {
        T along = T(0);
        for (u32 ox = col_range[2 * x]; ox < col_range[2 * x + 1]; ++ox)
            along = along + map[oy * g.ow + ox] * weight_of(cols, col_weights, ox, x);
        sum = sum + along * weight_of(rows, row_weights, oy, y);
    }
    dx[i] = sum;
}

extern "C" __global__ void nearest(u32 len, Grid g, const u32* rows, const u32* cols, const T* x, T* out) {
    ELEMENT(i, len);
    const T* map = x + (size_t)(i / (g.ow * g.oh)) * g.h * g.w;
    out[i] = map[rows[i / g.ow % g.oh] * g.w + cols[i % g.ow]];
}

extern "C" __global__ void nearest_grad(u32 len, Grid g, const u32* row_range, const u32* col_range, const T* grad,
                                        T* dx) {
    ELEMENT(i, len);
    u32 x = i % g.w, y = i / g.w % g.h;
    const T* map = grad + (size_t)(i / (g.w * g.h)) * g.oh * g.ow;
    T sum = T(0);
    for (u32 oy = row_range[2 * y]; oy < row_range[2 * y + 1]; ++oy)
        for (u32 ox = col_range[2 * x]; ox < col_range[2 * x + 1]; ++ox) sum = sum + map[oy * g.ow + ox];
    dx[i] = sum;
}

// One thread a pixel; `len` pixels in all, `m` an image.
extern "C" __global__ void log_softmax(u32 len, u32 c, u32 m, const T* x, T* out) {
    ELEMENT(i, len);
    size_t at = (size_t)(i / m) * c * m + i % m;
    T top = x[at];
    for (u32 k = 1; k < c; ++k) {
        T v = x[at + (size_t)k * m];
        top = v > top ? v : top;
    }
    T total = T(0);
    for (u32 k = 0; k < c; ++k) total = total + EXP(x[at + (size_t)k * m] - top);
    total = LOG(total);
    // Subtracted one after the other: their sum could round away a small logarithm.
    for (u32 k = 0; k < c; ++k) out[at + (size_t)k * m] = (x[at + (size_t)k * m] - top) - total;
}

extern "C" __global__ void log_softmax_grad(u32 len, u32 c, u32 m, const T* result, const T* grad, T* out) {
    ELEMENT(i, len);
    size_t at = (size_t)(i / m) * c * m + i % m;
    T total = T(0);
    for (u32 k = 0; k < c; ++k) total = total + grad[at + (size_t)k * m];
    for (u32 k = 0; k < c; ++k) {
        size_t j = at + (size_t)k * m;
        out[j] = grad[j] - EXP(result[j]) * total;
    }
}

// Sum over the BLOCK threads of a block, the same in each of them. Every thread must come here.
static __device__ double block_sum(double value) {
    __shared__ double lanes[BLOCK];
    lanes[threadIdx.x] = value;
    __syncthreads();
    for (u32 half = BLOCK / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
        __syncthreads();
    }
    double sum = lanes[0];
    // Nobody writes the lanes of the next sum before all have read this one.
    __syncthreads();
    return sum;
}

// Sum of squares of the elements a block walks over; the blocks share them.
extern "C" __global__ void squares(u32 len, const T* x, double* partial) {
    double sum = 0;
    for (u32 i = blockIdx.x * BLOCK + threadIdx.x; i < len; i += gridDim.x * BLOCK) sum += (double)x[i] * (double)x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// Element `i` of channel `channel` in a batch of planes of `m` pixels.
static __device__ size_t in_channel(u32 i, u32 c, u32 m, u32 channel) {
    return ((size_t)(i / m) * c + channel) * m + i % m;
}

// out[k] = sum of channel k over images and pixels; one block a channel, n * m elements each.
extern "C" __global__ void channel_sums(u32 nm, u32 c, u32 m, const T* x, T* out) {
    double sum = 0;
    for (u32 i = threadIdx.x; i < nm; i += BLOCK) sum += (double)x[in_channel(i, c, m, blockIdx.x)];
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = T(sum);
}

extern "C" __global__ void add_bias(u32 len, u32 c, u32 m, const T* bias, T* y) {
    ELEMENT(i, len);
    y[i] = y[i] + bias[i / m % c];
}

// Mean and 1 / sqrt(biased variance + eps) of each channel, one block a channel, in two passes.
extern "C" __global__ void moments(u32 nm, u32 c, u32 m, double eps, const T* x, T* mean, T* inverse_std) {
    double sum = 0;
    for (u32 i = threadIdx.x; i < nm; i += BLOCK) sum += (double)x[in_channel(i, c, m, blockIdx.x)];
    double centre = block_sum(sum) / nm, spread = 0;
    for (u32 i = threadIdx.x; i < nm; i += BLOCK) {
        double away = (double)x[in_channel(i, c, m, blockIdx.x)] - centre;
        spread += away * away;
    }
    spread = block_sum(spread) / nm;
    if (threadIdx.x == 0) {
        mean[blockIdx.x] = T(centre);
        inverse_std[blockIdx.x] = T(1.0 / sqrt(spread + eps));
    }
}

extern "C" __global__ void inverse_std(u32 len, double eps, const T* variance, T* out) {
    ELEMENT(i, len);
    out[i] = T(1.0 / sqrt((double)variance[i] + eps));
}

extern "C" __global__ void normalise(u32 len, u32 c, u32 m, const T* x, const T* mean, const T* inverse_std,
                                     const T* gamma, const T* beta, T* out) {
    ELEMENT(i, len);
    u32 k = i / m % c;
    T slope = T((double)inverse_std[k] * (double)gamma[k]);
    // The mean first: x * slope + shift would cancel where the mean is large beside the spread.
    out[i] = (x[i] - mean[k]) * slope + beta[k];
}

// running = (1 - momentum) * running + momentum * new; of variances the unbiased one, n m / (n m - 1) of the biased.
extern "C" __global__ void blend_mean(u32 c, double momentum, const T* mean, T* running) {
    ELEMENT(k, c);
    running[k] = T((1.0 - momentum) * (double)running[k] + momentum * (double)mean[k]);
}

extern "C" __global__ void blend_variance(u32 c, double momentum, double eps, double unbias, const T* inverse_std,
                                          T* running) {
    ELEMENT(k, c);
    double variance = 1.0 / ((double)inverse_std[k] * (double)inverse_std[k]) - eps;
    // Rounding may bring the variance of a constant channel below 0.
    variance = variance > 0 ? variance * unbias : 0.0;
    running[k] = T((1.0 - momentum) * (double)running[k] + momentum * variance);
}

// dgamma = sum g (x - mean) / std, dbeta = sum g; one block a channel.
extern "C" __global__ void norm_sums(u32 nm, u32 c, u32 m, const T* x, const T* grad, const T* mean,
                                     const T* inverse_std, T* dgamma, T* dbeta) {
    double sum = 0, tilted = 0, centre = (double)mean[blockIdx.x];
    for (u32 i = threadIdx.x; i < nm; i += BLOCK) {
        size_t at = in_channel(i, c, m, blockIdx.x);
        sum += (double)grad[at];
        tilted += ((double)x[at] - centre) * (double)grad[at];
    }
    sum = block_sum(sum);
    tilted = block_sum(tilted);
    if (threadIdx.x == 0) {
        dgamma[blockIdx.x] = T(tilted * (double)inverse_std[blockIdx.x]);
        dbeta[blockIdx.x] = T(sum);
    }
}

// dx = gamma / std * (g - [dbeta / nm + (x - mean) / std * dgamma / nm]), the bracket where `batch` is not 0.
extern "C" __global__ void norm_grad(u32 len, u32 c, u32 m, u32 nm, u32 batch, const T* x, const T* grad,
                                     const T* mean, const T* inverse_std, const T* gamma, const T* dgamma,
                                     const T* dbeta, T* dx) {
    ELEMENT(i, len);
    u32 k = i / m % c;
    double inverse = (double)inverse_std[k], wide = inverse * (double)gamma[k];
    T slope = T(wide);
    if (batch == 0) {
        dx[i] = grad[i] * slope;
        return;
    }
    T level = T(wide * (double)dbeta[k] / nm), tilt = T(wide * inverse * (double)dgamma[k] / nm);
    dx[i] = grad[i] * slope - level - (x[i] - mean[k]) * tilt;
}

// Peak of a pixel's logits and the sum of the exponentials relative to it.
static __device__ void softmax_of(const T* logits, size_t at, u32 c, u32 m, T* peak, T* sum) {
    T top = logits[at];
    for (u32 k = 1; k < c; ++k) {
        T v = logits[at + (size_t)k * m];
        top = v > top ? v : top;
    }
    T total = T(0);
    for (u32 k = 0; k < c; ++k) total = total + EXP(logits[at + (size_t)k * m] - top);
    *peak = top;
    *sum = total;
}

// Weighted negative log-likelihood, summed over each block's pixels; a target below 0 does not count, and its logits
// may be anything.
extern "C" __global__ void cross_entropy(u32 len, u32 c, u32 m, const T* logits, const short* targets,
                                         const double* weights, double* partial) {
    double loss = 0;
    u32 i = blockIdx.x * BLOCK + threadIdx.x;
    if (i < len && targets[i] >= 0) {
        size_t at = (size_t)(i / m) * c * m + i % m;
        T peak, sum;
        softmax_of(logits, at, c, m, &peak, &sum);
        T margin = peak - logits[at + (size_t)targets[i] * m];
        loss = weights[targets[i]] * ((double)margin + log((double)sum));
    }
    loss = block_sum(loss);
    if (threadIdx.x == 0) partial[blockIdx.x] = loss;
}

// Sum of the blocks over the total weight, 0 where that is 0; one block.
extern "C" __global__ void cross_entropy_mean(u32 n_partial, double total_weight, const double* partial, T* loss) {
    double sum = 0;
    for (u32 i = threadIdx.x; i < n_partial; i += BLOCK) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *loss = total_weight > 0 ? T(sum / total_weight) : T(0);
}

extern "C" __global__ void cross_entropy_grad(u32 len, u32 c, u32 m, double total_weight, const T* logits,
                                              const short* targets, const double* weights, const T* grad_loss,
                                              T* grad) {
    ELEMENT(i, len);
    size_t at = (size_t)(i / m) * c * m + i % m;
    if (targets[i] < 0 || !(total_weight > 0)) {
        for (u32 k = 0; k < c; ++k) grad[at + (size_t)k * m] = T(0);
        return;
    }
    u32 target = (u32)targets[i];
    T peak, sum;
    softmax_of(logits, at, c, m, &peak, &sum);
    double share = (double)*grad_loss * weights[target] / total_weight;
    T factor = T(share / (double)sum);
    for (u32 k = 0; k < c; ++k) {
        T g = factor * EXP(logits[at + (size_t)k * m] - peak);
        grad[at + (size_t)k * m] = k == target ? g - T(share) : g;
    }
}
