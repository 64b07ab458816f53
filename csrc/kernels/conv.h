// Convolutions as matrix products over the input where it lies: any kernel, stride, dilation, padding and groups.
//
// A task is a range of output pixels x a range of groups or of one group's filters. What it reads is a list of segments, each of neighbouring
// elements. Usually a segment is a place of the kernel with all its channels, and a table says where it lies for each
// pixel; out of the image, those are zeros. Where the channels are few, or lie outermost, a segment is a row of the
// kernel with all its places, and neighbouring pixels' are a fixed step apart; padding then needs a padded copy of the
// task's input.
//
// k is cut into slices: a slice of a panel of the weight stays in the first-level cache while the task's pixels, which
// stay in the second-level cache, pass over it; sums of slices collect in the output.
#pragma once

#include "conv_tile.h"

namespace trine {
namespace TRINE_ISA {

constexpr int64_t CONV_ROWS = 144;       // pixels of a task: a slice of them takes half of the second-level cache
constexpr int64_t CONV_ROWS_LEAST = 48;  // below that, reading weights is what takes the time
constexpr int64_t FEW_CHANNELS = 12;     // below that, whole rows of the kernel are segments

struct ConvJob {
    const ConvArgs* args;
    bool planar;    // x has its channels outermost
    bool lines;     // segments are rows of the kernel
    bool unpadded;  // no window reaches out of the image
    bool flat;      // pointwise, and neighbouring pixels are everywhere equally far apart: one line is all of the input
    bool even;      // the same of the output and the residual
    int64_t segments, run;
    int64_t segments_per_slice, parts;  // a slice is several segments, or one of `parts` of a segment
    int64_t panel;                      // floats of a panel
    int64_t regions;                    // what tasks don't cross: images if `lines`, else 1
    int64_t rows, rows_per_task, row_tasks;  // of a region
    int64_t columns_per_task, column_tasks;
    int64_t groups_per_task, group_tasks;
    int64_t block;  // pixels that the micro-kernel takes at once

    explicit ConvJob(const ConvArgs& a) : args(&a), planar(a.x_channel != 1) {
        const bool dense = planar ? a.x_pixel == 1 : a.x_pixel == a.channels;
        lines = planar || (a.groups == 1 && a.channels < FEW_CHANNELS && a.kernel_w > 1 && a.dilation_w == 1 && dense);
        segments = a.kernel_h * (lines ? (planar ? a.channels : 1) : a.kernel_w);
        run = lines ? a.kernel_w * (planar ? 1 : a.channels) : a.channels;
        unpadded = a.pad_top == 0 && a.pad_left == 0 && reach_w() <= a.width && reach_h(a.out_height) <= a.height;
        flat = segments == 1 && unpadded && !lines && is_even(a.x_pixel, a.x_row, a.x_image) && a.stride_w == 1 &&
               a.stride_h == 1 && a.width == a.out_width && a.height == a.out_height;
        even = is_even(a.out_pixel, a.out_row, a.out_image) &&
               (!a.residual || is_even(a.residual_pixel, a.residual_row, a.residual_image));
        panel = segments * run * PANEL;
        parts = ceil_div(run, BLOCK_DEPTH);
        segments_per_slice = parts > 1 ? 1 : ceil_div(segments, ceil_div(segments * run, BLOCK_DEPTH));
        block = a.filters <= W ? NARROW_PIXELS : BLOCK_PIXELS;
        divide();
    }

    bool is_even(int64_t pixel, int64_t row, int64_t image) const {
        return (args->out_height * args->images == 1 || row == pixel * args->out_width) &&
               (args->images == 1 || image == row * args->out_height);
    }

    // Input rows and columns, padding included, that `count` rows and all columns of the output see.
    int64_t reach_h(int64_t count) const {
        return (count - 1) * args->stride_h + (args->kernel_h - 1) * args->dilation_h + 1;
    }
    int64_t reach_w() const { return (args->out_width - 1) * args->stride_w + (args->kernel_w - 1) * args->dilation_w + 1; }

    // Some six tasks a thread, so that one that falls behind is helped.
    void divide() {
        const ConvArgs& a = *args;
        regions = lines ? a.images : 1;
        rows = a.images * a.out_height * a.out_width / regions;
        const int64_t most = CONV_ROWS * (rows <= CONV_ROWS * 3 / 2 ? 3 : 2) / 2;
        const int64_t tiles = ceil_div(a.filters, BLOCK_FILTERS);
        row_tasks = ceil_div(rows, most);
        // The groups of a task share its table.
        group_tasks = min(a.groups, ceil_div(6 * num_threads(), regions * row_tasks));
        groups_per_task = ceil_div(a.groups, group_tasks);
        group_tasks = ceil_div(a.groups, groups_per_task);
        const int64_t wanted = ceil_div(6 * num_threads(), regions * group_tasks);
        if (row_tasks * tiles < wanted) row_tasks = min(ceil_div(rows, CONV_ROWS_LEAST), ceil_div(wanted, tiles));
        rows_per_task = ceil_div(rows, row_tasks);
        if (lines) rows_per_task = round_up(rows_per_task, a.out_width);
        row_tasks = ceil_div(rows, rows_per_task);
        columns_per_task = ceil_div(tiles, min(tiles, ceil_div(wanted, row_tasks))) * BLOCK_FILTERS;
        column_tasks = ceil_div(a.filters, columns_per_task);
    }

    int64_t tasks() const { return group_tasks * regions * row_tasks * column_tasks; }
};

struct ConvTask {
    const ConvJob& job;
    const ConvArgs& a;
    int64_t first_group, end_group, first_row, rows, first_column, end_column;
    const float** table;  // [rows][segments] in the order that the micro-kernel reads; lines: [lines][segments]
    Rows<float> out;
    Rows<const float> add;

    ConvTask(const ConvJob& job, int64_t index) : job(job), a(*job.args) {
        first_column = index % job.column_tasks * job.columns_per_task;
        end_column = min(first_column + job.columns_per_task, a.filters);
        index /= job.column_tasks;
        const int64_t first = index % job.row_tasks * job.rows_per_task, region = index / job.row_tasks % job.regions;
        first_group = index / job.row_tasks / job.regions * job.groups_per_task;
        end_group = min(first_group + job.groups_per_task, a.groups);
        rows = min(job.rows_per_task, job.rows - first);
        first_row = region * job.rows + first;
        table = static_cast<const float**>(scratch(SCRATCH_TABLE, rows * (job.segments + 2) * sizeof(float*)));
        fill_outputs();
        if (job.flat)
            table[0] = a.x + first_row * a.x_pixel;
        else if (job.lines)
            fill_lines();
        else
            fill_places();
    }

    // body(row, image, y, x) for the task's output pixels.
    template <class Body>
    inline __attribute__((always_inline)) void over_pixels(const Body& body) const {
        int64_t x = first_row % a.out_width, y = first_row / a.out_width % a.out_height;
        int64_t n = first_row / a.out_width / a.out_height;
        for (int64_t r = 0; r < rows; ++r) {
            body(r, n, y, x);
            if (++x < a.out_width) continue;
            x = 0;
            if (++y < a.out_height) continue;
            y = 0;
            ++n;
        }
    }

    void fill_outputs() {
        out = {nullptr, a.out + first_row * a.out_pixel, a.out_pixel};
        add = {nullptr, a.residual + first_row * a.residual_pixel, a.residual_pixel};
        if (job.even) return;
        const float** added = table + rows * job.segments;
        float** written = const_cast<float**>(added + rows);
        over_pixels([&](int64_t r, int64_t n, int64_t y, int64_t x) {
            written[r] = a.out + n * a.out_image + y * a.out_row + x * a.out_pixel;
            added[r] = a.residual + n * a.residual_image + y * a.residual_row + x * a.residual_pixel;
        });
        out.table = written;
        add.table = added;
    }

    // Addresses of the first group's elements; the others' are a fixed step further.
    void fill_places() {
        const float* from = a.x;
        if (job.segments == 1 && job.unpadded) {
            over_pixels([&](int64_t r, int64_t n, int64_t y, int64_t x) {
                table[r] = from + n * a.x_image + y * a.stride_h * a.x_row + x * a.stride_w * a.x_pixel;
            });
            return;
        }
        const float* zeros = static_cast<const float*>(scratch(SCRATCH_ZEROS, a.groups * a.channels * sizeof(float)));
        const Blocks blocks(rows, job.block);
        int64_t block = 0, first = 0, end = blocks.first(1);
        over_pixels([&](int64_t r, int64_t n, int64_t y, int64_t x) {
            if (r == end) first = end, end = blocks.first(++block + 1);
            const float** to = table + first * job.segments + r - first;
            const float* image = from + n * a.x_image;
            const int64_t top = y * a.stride_h - a.pad_top, left = x * a.stride_w - a.pad_left;
            for (int64_t i = 0; i < a.kernel_h; ++i) {
                const int64_t row = top + i * a.dilation_h;
                const bool row_inside = row >= 0 && row < a.height;
                for (int64_t j = 0; j < a.kernel_w; ++j, to += end - first) {
                    const int64_t column = left + j * a.dilation_w;
                    const bool inside = row_inside && column >= 0 && column < a.width;
                    *to = inside ? image + row * a.x_row + column * a.x_pixel : zeros;
                }
            }
        });
    }

    // Rows [top, top + count) of the input, with the padding around them: [planes][count][length].
    const float* copy_input(const float* image, int64_t top, int64_t count, int64_t planes, int64_t length) const {
        const int64_t unit = job.planar ? 1 : a.channels;
        float* copy = static_cast<float*>(scratch(SCRATCH_LINES, planes * count * length * sizeof(float)));
        float* to = copy;
        for (int64_t plane = 0; plane < planes; ++plane)
            for (int64_t row = top; row < top + count; ++row, to += length) {
                const bool exists = row >= 0 && row < a.height;
                const int64_t start = exists ? min(length, max<int64_t>(a.pad_left, 0) * unit) : length;
                const int64_t end = exists ? max(start, min(length, (a.width + a.pad_left) * unit)) : length;
                const float* from = image + plane * a.x_channel + row * a.x_row + start - a.pad_left * unit;
                for (int64_t i = 0; i < start; ++i) to[i] = 0;
                if (end > start) memcpy(to + start, from, (end - start) * sizeof(float));
                for (int64_t i = end; i < length; ++i) to[i] = 0;
            }
        return copy;
    }

    void fill_lines() {
        const int64_t planes = job.planar ? a.channels : 1, length = job.reach_w() * (job.planar ? 1 : a.channels);
        const int64_t lines = rows / a.out_width, line = first_row / a.out_width;
        const int64_t top = line % a.out_height * a.stride_h - a.pad_top, count = job.reach_h(lines);
        const float* from = a.x + line / a.out_height * a.x_image;
        int64_t plane_step = a.x_channel, row_step = a.x_row;
        if (job.unpadded) {
            from += top * a.x_row;
        } else {
            from = copy_input(from, top, count, planes, length);
            plane_step = count * length;
            row_step = length;
        }
        for (int64_t y = 0; y < lines; ++y)
            for (int64_t s = 0; s < job.segments; ++s) {
                const int64_t row = y * a.stride_h + s % a.kernel_h * a.dilation_h;
                table[y * job.segments + s] = from + s / a.kernel_h * plane_step + row * row_step;
            }
    }

    // One slice of a group's k: segments from `segment` on, `offset` elements into them.
    void run_slice(int64_t group, int64_t segment, int64_t offset, int64_t length) const {
        const int64_t panels = ceil_div(a.filters, PANEL);
        const float* weight = a.weight + group * panels * job.panel + (segment * job.run + offset) * PANEL;
        const float* bias = a.bias ? a.bias + group * panels * PANEL : nullptr;
        const bool is_first = segment == 0 && offset == 0;
        PixelTiles t;
        t.segments = min(job.segments_per_slice, job.segments - segment);
        t.offset = group * a.channels + offset;
        t.run = length;
        t.panel = job.panel;
        const bool is_last = segment + t.segments == job.segments && offset + length == job.run;
        t.activation = is_last ? a.activation : NO_ACTIVATION;
        t.line_step = job.flat ? a.x_pixel : job.lines ? a.stride_w * (job.planar ? 1 : a.channels) : 0;
        t.adds = !is_first || a.residual;
        const int64_t together = job.lines ? a.out_width : rows;
        const Blocks blocks(together, job.block);
        for (int64_t column = first_column; column < end_column; column += BLOCK_FILTERS) {
            t.column = group * a.filters + column;
            t.columns = min(BLOCK_FILTERS, end_column - column);
            t.weight = weight + column / PANEL * job.panel;
            t.bias = is_first && bias ? bias + column : nullptr;
            for (int64_t row = 0; row < rows; row += together) {
                t.out = out.from(row);
                t.add = is_first ? add.from(row) : Rows<const float>{t.out.table, t.out.first, t.out.step};
                tiles_of_blocks(t, blocks, table + row / together * job.segments, job.segments, segment);
            }
        }
    }

    void run() const {
        const int64_t length = ceil_div(job.run, job.parts);
        for (int64_t group = first_group; group < end_group; ++group)
            for (int64_t s = 0; s < job.segments; s += job.segments_per_slice)
                for (int64_t offset = 0; offset < job.run; offset += length)
                    run_slice(group, s, offset, min(length, job.run - offset));
    }
};

static void conv(const ConvArgs& args) {
    const ConvJob job(args);
    if (job.rows == 0 || args.channels == 0) return;
    const auto task = [&](int64_t i) { ConvTask(job, i).run(); };
    if (job.rows * job.regions * args.groups * args.filters * job.segments * job.run < SERIAL_WORK)
        for (int64_t i = 0; i < job.tasks(); ++i) task(i);
    else
        parallel(job.tasks(), task);
}

}  // namespace TRINE_ISA
}  // namespace trine
