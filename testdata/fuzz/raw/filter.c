#define BASE 0x10
static const __u64 map[1] = { [0] = 8 | 1 };
struct kvm_msr_filter f = {
	.flags = KVM_MSR_FILTER_DEFAULT_DENY, /* all else */
	.ranges = {
		{ .flags = KVM_MSR_FILTER_READ, .nmsrs = 4, .base = BASE, .bitmap = (__u8 *)map },
		{ 3, 2, MSR_EFER, (__u8[8]){ 0xff } },
	},
};
