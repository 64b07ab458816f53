// Convolutions on the tile registers of AMX that read images where they lie, or a copy with its padding around it: no
// window is gathered. A tile of inputs is 16 neighbouring output pixels by up to 64 bytes of one place's channels; one
// place of the kernel after the other is an offset.
//
// Where neighbours are one pixel apart, the lines of an image follow one another, padding between them once: output
// pixels are then a flat run, the padding's own results among them, which are dropped. For larger strides a copy sorts
// the pixels by their remainders, so that neighbours are one apart again. Else tiles end with lines.
//
// The sums of 32 pixels by two panels of filters stay in four tiles. A slice of a panel pair stays in the first-level
// cache while a task's pixels, which come from the second, pass over it.
#pragma once

#include "amx.h"
#include "windows.h"

namespace trine {
namespace TRINE_ISA {

constexpr int64_t BLOCK_ROWS = 2 * TILE_ROWS;
constexpr int64_t SLICE_STEPS = 32;        // of a slice: 64 KiB of a panel pair
constexpr int64_t NEAR_STEPS = 6;        // that the first to read a slice reads ahead
constexpr int64_t TASK_BLOCKS = 24;        // of pixels, at most: some 100 KiB of input at 64 channels
constexpr int64_t LOCAL_COPY_BLOCKS = 24;  // of an image, from which on tasks copy their own lines

struct Bf16Tiles {
    using Element = bf16;
    using Sum = float;
    static constexpr int64_t unit = 2;  // neighbours in k that lie side by side
    template <int C, int A, int B>
    INLINE void dot() {
        tile_dot_bf16<C, A, B>();
    }
};
struct ByteTiles {
    using Element = uint8_t;
    using Sum = int32_t;
    static constexpr int64_t unit = 4;
    template <int C, int A, int B>
    INLINE void dot() {
        tile_dot_unsigned<C, A, B>();
    }
};

// The largest part of `channels` that fills a tile's row evenly; 0: none that is worth it.
template <class E>
INLINE int64_t tile_depth(int64_t channels) {
    constexpr int64_t most = 64 / sizeof(typename E::Element);
    const int64_t parts = ceil_div(channels, most);
    for (int64_t p = parts; p <= parts + parts / 2; ++p)
        if (channels % (p * E::unit) == 0) return channels / p;
    return 0;
}

// Whether a step is a line of the kernel, all its places.
template <class E>
INLINE bool whole_lines(const WindowArgs& a) {
    const int64_t bytes = a.channels * a.kernel_w * sizeof(typename E::Element);
    return a.groups == 1 && a.dilation_w == 1 && a.channels % E::unit == 0 && bytes <= 64 && a.kernel_w > 1 &&
           (a.x_channels || a.x_pixel == a.channels);
}

// Whether tiles read this input where it lies; else windows are gathered.
template <class E>
INLINE bool tiles_suit(const WindowArgs& a) {
    return a.images * a.out_height * a.out_width > 0 && (tile_depth<E>(a.channels) > 0 || whole_lines<E>(a)) && a.pad_top >= 0 && a.pad_left >= 0;
}

INLINE void configure_steps(int64_t rows, int64_t bytes) {
    TileConfig config;
    const int64_t first = min(rows, TILE_ROWS), second = rows > TILE_ROWS ? rows - TILE_ROWS : first;
    for (int t = 0; t < 4; ++t) config.set(t, t < 2 ? first : second);
    config.set(4, first, bytes);
    config.set(5, second, bytes);
    config.set(6, bytes / 4);
    config.set(7, bytes / 4);
    tile_configure(config);
}

// A run of steps of k: where each lies from a pixel's own place on, in bytes, and what to bring in meanwhile.
struct Steps {
    const int64_t* offsets;
    int64_t count, bytes;  // of a step of one panel
    const char* ahead[2];
    int64_t rate;  // bytes of each of `ahead` a step
    INLINE void prefetch(const Steps& s, int64_t i) {
        for (int64_t j = i * s.rate; j < (i + 1) * s.rate; j += 64) {
            __builtin_prefetch(s.ahead[0] + j, 0, 2);
            __builtin_prefetch(s.ahead[1] + j, 0, 2);
        }
    }
};

template <class E>
static void tiles_tall(const char* x, int64_t stride, const char* const* b, const Steps& s, typename E::Sum* c,
                       int64_t ldc, bool accumulate) {
    const int64_t below = TILE_ROWS * stride;
    float *c0 = reinterpret_cast<float*>(c), *c2 = c0 + TILE_ROWS * ldc;
    begin_sum<0>(c0, ldc, accumulate);
    begin_sum<1>(c0 + PANEL, ldc, accumulate);
    begin_sum<2>(c2, ldc, accumulate);
    begin_sum<3>(c2 + PANEL, ldc, accumulate);
    for (int64_t i = 0; i < s.count; ++i) {
        Steps::prefetch(s, i);
        const char* from = x + s.offsets[i];
        tile_load<6>(b[0] + i * s.bytes, 64);
        tile_load<4>(from, stride);
        E::template dot<0, 4, 6>();
        tile_load<7>(b[1] + i * s.bytes, 64);
        E::template dot<1, 4, 7>();
        tile_load<5>(from + below, stride);
        E::template dot<2, 5, 6>();
        E::template dot<3, 5, 7>();
    }
    tile_store<0>(c0, ldc * 4);
    tile_store<1>(c0 + PANEL, ldc * 4);
    tile_store<2>(c2, ldc * 4);
    tile_store<3>(c2 + PANEL, ldc * 4);
}

// Up to 16 pixels by P panels.
template <class E, int P>
static void tiles_flat(const char* x, int64_t stride, const char* const* b, const Steps& s, typename E::Sum* c,
                       int64_t ldc, bool accumulate) {
    float* c0 = reinterpret_cast<float*>(c);
    begin_sum<0>(c0, ldc, accumulate);
    if (P > 1) begin_sum<1>(c0 + PANEL, ldc, accumulate);
    if (P > 2) begin_sum<2>(c0 + 2 * PANEL, ldc, accumulate);
    if (P > 2) begin_sum<3>(c0 + 3 * PANEL, ldc, accumulate);
    for (int64_t i = 0; i < s.count; ++i) {
        Steps::prefetch(s, i);
        tile_load<4>(x + s.offsets[i], stride);
        tile_load<6>(b[0] + i * s.bytes, 64);
        E::template dot<0, 4, 6>();
        if (P > 1) {
            tile_load<7>(b[1] + i * s.bytes, 64);
            E::template dot<1, 4, 7>();
        }
        if (P > 2) {
            tile_load<6>(b[2] + i * s.bytes, 64);
            E::template dot<2, 4, 6>();
            tile_load<7>(b[3] + i * s.bytes, 64);
            E::template dot<3, 4, 7>();
        }
    }
    tile_store<0>(c0, ldc * 4);
    if (P > 1) tile_store<1>(c0 + PANEL, ldc * 4);
    if (P > 2) tile_store<2>(c0 + 2 * PANEL, ldc * 4);
    if (P > 2) tile_store<3>(c0 + 3 * PANEL, ldc * 4);
}

template <class E, class Core>
struct TileConv {
    using Element = typename E::Element;
    using Sum = typename E::Sum;
    static constexpr int64_t size = sizeof(Element);

    WindowArgs a;
    const Core core;
    bool copies, flat, shared;  // shared: one copy for all tasks, else each task copies the lines that it reads
    int64_t depth, steps;
    int64_t pitch, line;       // elements from pixel to pixel and from line to line of what tiles read
    int64_t wide;              // pixels of a line of it
    bool sorted;               // the copy has a plane of `plane` elements for each remainder of lines and columns
    int64_t planes_h, planes_w, plane;
    int64_t rows, blocks;      // of one image and group: output pixels with the padding between lines, 32 of them
    int64_t line_blocks;       // blocks of a line, unless flat
    int64_t copied_lines, image_elements;
    int64_t panels, together;
    int64_t blocks_per_task, block_tasks, groups_per_task, panel_tasks;
    const int64_t* offsets;
    const Element* source;  // of the first group of the first image

    TileConv(const WindowArgs& args, const Core& core) : a(args), core(core) {
        const bool lines = whole_lines<E>(a);
        depth = lines ? a.channels * a.kernel_w : tile_depth<E>(a.channels);
        steps = a.kernel_h * a.kernel_w * a.channels / depth;
        panels = ceil_div(a.filters, PANEL);
        const int64_t reach_w = (a.out_width - 1) * a.stride_w + (a.kernel_w - 1) * a.dilation_w + 1;
        const int64_t reach_h = (a.out_height - 1) * a.stride_h + (a.kernel_h - 1) * a.dilation_h + 1;
        const Element* own = a.x_channels ? nullptr : core.direct(a);
        copies = !own || a.pad_top || a.pad_left || reach_h > a.height || reach_w > a.width;
        sorted = (a.stride_h > 1 || a.stride_w > 1) && !lines && !a.x_channels;
        planes_h = sorted ? min(a.stride_h, (a.kernel_h - 1) * a.dilation_h + 1) : 1;
        planes_w = sorted ? min(a.stride_w, (a.kernel_w - 1) * a.dilation_w + 1) : 1;
        copies = copies || sorted;
        flat = sorted || (a.stride_h == 1 && a.stride_w == 1 && (copies || a.x_row == a.width * a.x_pixel));
        const bool pointwise = a.kernel_h * a.kernel_w == 1 && flat && !sorted && !a.x_channels && a.out_height == a.height && a.out_width == a.width;
        if (pointwise && !a.pad_top && !a.pad_left && a.x_row == a.width * a.x_pixel && a.x_image == a.height * a.x_row)
            merge_images();
        wide = copies ? max(a.width + a.pad_left, flat ? reach_w - a.pad_left : reach_w) : a.width;
        pitch = copies ? a.channels * a.groups : a.x_pixel;
        if (sorted) wide = ceil_div(reach_w, a.stride_w);
        line = copies ? wide * pitch : a.x_row;
        rows = flat ? (a.out_height - 1) * wide + a.out_width : 0;
        line_blocks = ceil_div(a.out_width, BLOCK_ROWS);
        blocks = flat ? ceil_div(rows, BLOCK_ROWS) : a.out_height * line_blocks;
        copied_lines = (a.out_height - 1) * a.stride_h + (a.kernel_h - 1) * a.dilation_h + 1;
        plane = ceil_div(copied_lines, a.stride_h) * line;
        image_elements = (sorted ? planes_h * planes_w * plane : copied_lines * line) + tail();
        together = (flat ? rows : a.out_width) <= TILE_ROWS ? 4 : 2;
        source = own;
        divide();
        find_offsets();
    }

    void merge_images() {
        a.height = a.out_height = a.images * a.height;
        a.images = 1;
    }

    // Elements after the last line that the last tiles touch.
    int64_t tail() const { return (a.kernel_w * a.dilation_w + a.pad_left) * pitch + 64; }

    void divide() {
        shared = copies && blocks < LOCAL_COPY_BLOCKS && a.kernel_h * a.kernel_w > 1;
        if (sorted) shared = a.images < 2 * num_threads();
        const int64_t threads = num_threads(), groups = ceil_div(panels, together);
        const int64_t regions = copies && !shared ? a.images : 1, all = copies && !shared ? blocks : blocks * a.images;
        block_tasks = max(ceil_div(all, TASK_BLOCKS), min(all / 8, ceil_div(4 * threads, regions * a.groups)));
        block_tasks = sorted && !shared ? 1 : max<int64_t>(1, block_tasks);
        blocks_per_task = ceil_div(all, block_tasks);
        block_tasks = ceil_div(all, blocks_per_task) * regions;
        const int64_t others = block_tasks * a.groups;
        panel_tasks = others >= 2 * threads ? 1 : max<int64_t>(1, min(groups, ceil_div(4 * threads, others)));
        groups_per_task = ceil_div(groups, panel_tasks);
        panel_tasks = ceil_div(groups, groups_per_task);
    }

    void find_offsets() {
        int64_t* to = static_cast<int64_t*>(scratch(SCRATCH_TABLE, steps * sizeof(int64_t)));
        offsets = to;
        for (int64_t i = 0; i < a.kernel_h; ++i)
            for (int64_t j = 0; j < a.kernel_w; j += max<int64_t>(1, depth / a.channels))
                for (int64_t c = 0; c < a.channels; c += depth) *to++ = (place_offset(i * a.dilation_h, j * a.dilation_w) + c) * size;
    }

    // Where the pixel y lines below and x columns beside an output pixel's first one lies from that on.
    int64_t place_offset(int64_t y, int64_t x) const {
        if (!sorted) return y * line + x * pitch;
        return (y % a.stride_h * planes_w + x % a.stride_w) * plane + y / a.stride_h * line + x / a.stride_w * pitch;
    }

    // One plane of an image's copy.
    void sort_pixels(int64_t image, int64_t which, Element* to) const {
        const int64_t unit = a.channels * a.groups, first = which / planes_w - a.pad_top, left = which % planes_w - a.pad_left;
        const char* x = static_cast<const char*>(a.x) + image * a.x_image * core.element();
        const Element nothing = core.padding();
        for (int64_t i = 0; i < plane / line; ++i)
            for (int64_t j = 0; j < wide; ++j, to += unit) {
                const int64_t row = first + i * a.stride_h, column = left + j * a.stride_w;
                if (row >= 0 && row < a.height && column >= 0 && column < a.width)
                    core.copy(x + (row * a.x_row + column * a.x_pixel) * core.element(), unit, to);
                else
                    for (int64_t c = 0; c < unit; ++c) to[c] = nothing;
            }
    }

    // Lines [first, first + count) of an image, counted with the padding above it, with what lies around them; after
    // the last of all (`ends`) also what tiles touch there.
    void copy_lines(int64_t image, int64_t first, int64_t count, bool ends, Element* to) const {
        const int64_t unit = a.channels * a.groups;
        const char* x = static_cast<const char*>(a.x) + image * a.x_image * core.element();
        const Element nothing = core.padding();
        const auto fill = [&](Element* p, int64_t n) {
            for (int64_t i = 0; i < n; ++i) p[i] = nothing;
        };
        for (int64_t y = first - a.pad_top; y < first + count - a.pad_top; ++y, to += line) {
            if (y < 0 || y >= a.height) {
                fill(to, line);
                continue;
            }
            const char* from = x + y * a.x_row * core.element();
            const int64_t used = min(a.width, wide - a.pad_left);
            fill(to, a.pad_left * unit);
            Element* row = to + a.pad_left * unit;
            if (a.x_channels)
                core.interleave(from, a, used, row);
            else if (a.x_pixel == unit)
                core.copy(from, used * unit, row);
            else
                for (int64_t i = 0; i < used; ++i) core.copy(from + i * a.x_pixel * core.element(), unit, row + i * unit);
            fill(row + used * unit, (wide - a.pad_left - used) * unit);
        }
        if (ends) fill(to, tail());
    }

    int64_t first_line(int64_t block) const {
        return flat ? block * BLOCK_ROWS / wide : block / line_blocks * a.stride_h;
    }
    int64_t end_line(int64_t block) const {  // of those that the block reads
        const int64_t last = flat ? (min(rows, (block + 1) * BLOCK_ROWS) - 1) / wide : block / line_blocks * a.stride_h;
        return last + (a.kernel_h - 1) * a.dilation_h + 1;
    }

    struct Block {
        const char* x;
        int64_t rows, image, y, column;
    };
    // `lines` is where line `first` of the block's image lies.
    Block block_at(int64_t image, int64_t block, const Element* lines, int64_t first) const {
        if (flat) {
            const int64_t q = block * BLOCK_ROWS;
            return {reinterpret_cast<const char*>(lines + q * pitch - first * line), min(BLOCK_ROWS, rows - q), image,
                    q / wide, q % wide};
        }
        const int64_t y = block / line_blocks, column = block % line_blocks * BLOCK_ROWS;
        return {reinterpret_cast<const char*>(lines + (y * a.stride_h - first) * line + column * a.stride_w * pitch),
                min(BLOCK_ROWS, a.out_width - column), image, y, column};
    }

    // The sums of a block, run by run of pixels that exist.
    void finish_block(const Block& block, const Sum* c, int64_t ldc, int64_t group, int64_t panel, int64_t count) const {
        int64_t y = block.y, column = block.column;
        for (int64_t r = 0; r < block.rows;) {
            const int64_t run = min(a.out_width - column, block.rows - r);
            const int64_t line_out = (block.image * a.out_height + y) * max<int64_t>(1, a.out_step);
            const int64_t row = line_out * a.out_width + column;
            const int64_t filter = panel * PANEL;
            if (run > 0)
                finish_run(a, core, c + r * ldc, ldc, run, row, group * a.filters + filter, group * panels * PANEL + filter,
                           min(count * PANEL, a.filters - filter));
            r += max<int64_t>(0, run);
            if (run > 0) column += run;
            if (flat && r < block.rows) {  // what lies between two lines
                r += wide - column;
                column = 0, ++y;
            }
        }
    }

    void run_panels(const Block* list, int64_t count, int64_t group, int64_t panel, Sum* c) const {
        const int64_t step_bytes = depth * PANEL * size, panel_bytes = a.depth * PANEL * size;
        const char* weight = static_cast<const char*>(a.weight) + (group * panels + panel) * panel_bytes;
        const int64_t some = min(together, panels - panel), ldc = together * PANEL;
        const int64_t stride = (flat ? 1 : a.stride_w) * pitch * size;
        const int64_t slice = count > 2 ? SLICE_STEPS : steps;
        // Sums that are whole at once are finished out of the first-level cache.
        const auto at = [&](int64_t i) { return (slice >= steps ? i % 2 : i) * BLOCK_ROWS * ldc; };
        int64_t configured = 0;
        for (int64_t start = 0; start < steps; start += slice) {
            const char* b[4];
            for (int64_t p = 0; p < 4; ++p) b[p] = weight + min(p, some - 1) * panel_bytes + start * step_bytes;
            Steps s{offsets + start, min(slice, steps - start), step_bytes, {}, 0};
            for (int64_t i = 0; i < count; ++i) {
                const Block& block = list[i];
                // The first block reads a little ahead of itself, the others bring in what comes next.
                s.rate = i == 0 ? step_bytes : round_up(ceil_div(step_bytes, count - 1), 64);
                const bool last = start + slice >= steps;
                const int64_t next = s.count * step_bytes + (last ? together * panel_bytes - steps * step_bytes : 0);
                const int64_t skipped = i == 0 ? NEAR_STEPS * step_bytes : next + (i - 1) * s.count * s.rate;
                for (int k = 0; k < 2; ++k) s.ahead[k] = b[k] + skipped;
                if (block.rows != configured) configure_steps(configured = block.rows, depth * size);
                Sum* sums = c + at(i);
                if (block.rows > TILE_ROWS)
                    tiles_tall<E>(block.x, stride, b, s, sums, ldc, start > 0);
                else if (some > 2)
                    tiles_flat<E, 4>(block.x, stride, b, s, sums, ldc, start > 0);
                else
                    tiles_flat<E, 2>(block.x, stride, b, s, sums, ldc, start > 0);
                // One block late, so that sums are on their way from the tiles to memory meanwhile.
                if (last && i > 0) finish_block(list[i - 1], c + at(i - 1), ldc, group, panel, some);
                if (last && i == count - 1) finish_block(block, sums, ldc, group, panel, some);
            }
        }
    }

    void run_task(int64_t index) const {
        const int64_t first_group = index % panel_tasks * groups_per_task;
        index /= panel_tasks;
        const int64_t part = index % block_tasks, group = index / block_tasks;
        const bool local = copies && !shared;
        const int64_t parts = local ? block_tasks / a.images : block_tasks, all = local ? blocks : blocks * a.images;
        const int64_t first = part % parts * blocks_per_task, end = min(all, first + blocks_per_task);
        const Element* lines = source;
        int64_t line_zero = 0;
        if (local) {
            line_zero = sorted ? 0 : first_line(first);
            const int64_t count = sorted ? 0 : min(copied_lines, end_line(end - 1)) - line_zero;
            const int64_t elements = sorted ? image_elements : count * line + tail();
            Element* own = static_cast<Element*>(scratch(SCRATCH_INPUT, elements * size));
            if (sorted)
                for (int64_t i = 0; i < planes_h * planes_w; ++i) sort_pixels(part / parts, i, own + i * plane);
            else
                copy_lines(part / parts, line_zero, count, true, own);
            lines = own;
        }
        Block* list = static_cast<Block*>(scratch(SCRATCH_PARTIAL, (end - first) * sizeof(Block)));
        const int64_t elements = copies ? image_elements : a.x_image;
        for (int64_t i = first; i < end; ++i) {
            const int64_t image = local ? part / parts : i / blocks;
            const Element* from = lines + group * a.channels + (local ? 0 : image * elements);
            list[i - first] = block_at(image, local ? i : i % blocks, from, line_zero);
        }
        const int64_t count = end - first;
        Sum* c = static_cast<Sum*>(scratch(SCRATCH_ACCUMULATOR, count * BLOCK_ROWS * together * PANEL * sizeof(Sum)));
        const int64_t end_panel = min(panels, (first_group + groups_per_task) * together);
        for (int64_t p = first_group * together; p < end_panel; p += together) run_panels(list, count, group, p, c);
        tile_release();
    }

    void run() {
        if (shared) {
            Element* copy = static_cast<Element*>(scratch(SCRATCH_LINES, a.images * image_elements * size));
            source = copy;
            constexpr int64_t some = 4;  // lines; the last part also writes what lies after them
            const int64_t parts = sorted ? planes_h * planes_w : ceil_div(copied_lines, some);
            parallel(a.images * parts, [&](int64_t i) {
                if (sorted) return sort_pixels(i / parts, i % parts, copy + i / parts * image_elements + i % parts * plane);
                const int64_t first = i % parts * some, count = min(some, copied_lines - first);
                copy_lines(i / parts, first, count, first + count == copied_lines,
                           copy + i / parts * image_elements + first * line);
            });
        }
        const int64_t tasks = block_tasks * panel_tasks * a.groups;
        if (a.images * blocks * BLOCK_ROWS * steps * depth * a.filters * a.groups < SERIAL_WORK)
            for (int64_t i = 0; i < tasks; ++i) run_task(i);
        else
            parallel(tasks, [&](int64_t i) { run_task(i); });
    }
};

}  // namespace TRINE_ISA
}  // namespace trine
