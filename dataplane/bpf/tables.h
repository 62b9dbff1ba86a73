/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tables.h: the maps themselves and what every program does with them.
 *
 * Included once per object. The engine creates the maps by loading the object;
 * names and types are looked for by steering/mod.rs. `sluice_counters` is used by
 * every program that is attached to a device: by it and by the program's name
 * a later process knows that a program is ours.
 */
#ifndef SLUICE_TABLES_H
#define SLUICE_TABLES_H

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"

/* What tc programs return. TC_NEXT is TCX_NEXT and TC_ACT_UNSPEC: the next program on the device runs. */
#define TC_NEXT (-1)
#define TC_DROP 2

#define MAX_FRONTENDS 262144
#define MAX_NODE_ADDRESSES 4096
#define MAX_DEVICES 4096

volatile const struct steering_config config = {};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_FRONTENDS);
	__type(key, struct frontend_key);
	__type(value, __u32);
} frontends SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_NODE_ADDRESSES);
	__type(key, __u8[16]);
	__type(value, __u32);
} node_addresses SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, HEARTBEAT_SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} heartbeat SEC(".maps");

/* max_entries is set at load: workers times buckets_per_worker. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct bucket);
} tuples SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, MAX_UPLINKS * QUEUES_PER_UPLINK);
	__type(key, __u32);
	__type(value, __u32);
} xsks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_DEVICES);
	__type(key, __u32);
	__type(value, struct device);
} devices SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} sluice_counters SEC(".maps");

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&sluice_counters, &counter);

	if (value)
		*value += 1;
}

#endif
