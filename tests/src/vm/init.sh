#!/bin/busybox sh
# The initramfs of test VMs: mounts the root and the disk of job files, and goes on with the program in it.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
for module in $($B cat /modules/order); do $B insmod /modules/$module; done
tries=0
while [ ! -b /dev/vdb ] && [ $tries -lt 500 ]; do $B usleep 20000; tries=$((tries + 1)); done
$B mount -t ext4 -o rw,noatime /dev/vda /newroot || { echo "no root file system"; $B poweroff -f; }
$B mkdir -p /newroot/job
$B mount -t ext4 -o ro,noatime /dev/vdb /newroot/job || { echo "no job files"; $B poweroff -f; }
$B mount --move /proc /newroot/proc
$B mount --move /sys /newroot/sys
$B mount --move /dev /newroot/dev
exec $B switch_root /newroot /job/vm-lab init
