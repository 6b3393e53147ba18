#!/bin/busybox sh
# The first process of a lane's kernel: loads the modules, runs /command and says how it ended.
# The console is on the first serial port, the command's output on the second, marks on the third.
B=/bin/busybox
$B mount -t proc none /proc
$B mount -t devtmpfs none /dev
$B mount -t sysfs none /sys
. /settings
for port in /dev/ttyS1 /dev/ttyS2; do $B stty -F $port 115200 raw -echo -opost; done

die() { echo "fail=$*" > /dev/ttyS2; $B sleep 1; $B poweroff -f; $B sleep 60; }
load() {
    while read -r file; do
        parameters=
        case $file in
            # The early calibration of an emulated TSC is off in some boots, and KVM then takes the
            # guest's rate for a wish that it cannot grant. A wide tolerance makes it harmless.
            kvm.ko) parameters="tsc_tolerance_ppm=20000 $KVM_PARAMETERS" ;;
            kvm-amd.ko | kvm-intel.ko) parameters=$VENDOR_PARAMETERS ;;
        esac
        $B insmod "/modules/$file" $parameters || die "cannot load $file $parameters"
    done < "/modules/$1.order"
}

load kvm
[ -c /dev/kvm ] || die "the modules loaded and there is no /dev/kvm"
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb

if [ "$ROOT" = 9p ]; then
    load 9p
    $B mkdir /lower /upper /new
    $B mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose root /lower || die "cannot mount the host's root"
    $B mount -t tmpfs none /upper
    $B mkdir /upper/files /upper/work
    $B mount -t overlay overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work /new || die "cannot mount the overlay"
    for folder in proc sys dev; do $B mount --move /$folder /new/$folder || die "cannot move /$folder"; done
    DEV=/new/dev
    [ -d /add ] && $B cp -a /add/. /new/
    set -- $B chroot /new /bin/sh
else
    DEV=/dev
    set -- $B sh
fi
$B mkdir -p $DEV/shm $DEV/pts
$B mount -t tmpfs none $DEV/shm
$B mount -t devpts none $DEV/pts
$B ln -s /proc/self/fd $DEV/fd

echo start > $DEV/ttyS2
# As long as this comes the machine runs, whatever the command does. What is in the background reads /dev/null.
[ -c /dev/null ] || $B mknod /dev/null c 1 3
(while $B sleep 5; do echo alive > $DEV/ttyS2; done) &
# Held open to the end: a port forgets what it has not sent when its last writer is killed.
exec 4> $DEV/ttyS1
"$@" -c "$($B cat /command)" < $DEV/null >&4 2>&1 4>&-
status=$?
$B sync
# By this the lane tells that all of the output came.
$B printf '\000end\n' >&4
echo "rc=$status" > $DEV/ttyS2
$B sleep 3
$B poweroff -f
$B sleep 60
