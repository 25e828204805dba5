#!/usr/bin/env perl
# What Perl scripts see: N of them call in a closed loop, and one JSON report tells how that went.
#
#     client.pl --way call_python|call_many|reconnect|by_hand|process --socket PATH --clients N
#               --seconds S --batch B --request FILE [--python PYTHON --script FILE]
#
# `call_python` keeps its connection, `reconnect` opens one for each call, `call_many` sends batches
# of B, whose calls all count with the time of their batch. `by_hand` is what a script does without
# CPANBridge.pm: a connection for each call, with IO::Socket::UNIX and JSON::PP. `process` starts a
# Python for each call.
# The report has the fields of load.c's. Exit status 1 when a call failed.
use 5.010;
use strict;
use warnings;

use CPANBridge;
use CPANBridge::JSON;
use Getopt::Long qw(GetOptions);
use IO::Socket::UNIX;
use IPC::Open2 qw(open2);
use JSON::PP ();
use Time::HiRes qw(time);

my %option = (clients => 1, seconds => 1, batch => 100);
GetOptions(\%option, qw(way=s socket=s clients=i seconds=f batch=i request=s python=s script=s))
    or exit 2;

my $bytes   = do { local (@ARGV, $/) = $option{request}; <> };
my $request = CPANBridge::JSON::decode($bytes);
my @call    = @{$request}{qw(module function params)};

my $json = JSON::PP->new->utf8;

my %ways = (
    call_python => sub { my ($bridge) = @_; $bridge->call(@call); return 1 },
    reconnect   => sub { my ($bridge) = @_; $bridge->call(@call); $bridge->disconnect; return 1 },
    call_many   => sub {
        my ($bridge) = @_;
        $bridge->call_many([ (\@call) x $option{batch} ]);
        die $bridge->get_last_error if $bridge->get_last_error;
        return $option{batch};
    },
    by_hand => sub {
        my $server = IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $option{socket})
            or die "$option{socket}: $!\n";
        print {$server} $json->encode($request);
        $server->shutdown(1);
        my $reply = $json->decode(do { local $/; <$server> });
        die "$reply->{error}\n" if !$reply->{success};
        return 1;
    },
    process => sub {
        my $pid = open2(my $from, my $to, $option{python}, $option{script});
        print {$to} CPANBridge::JSON::encode($request);
        close $to;
        my $reply = CPANBridge::JSON::decode(do { local $/; <$from> });
        waitpid $pid, 0;
        die "the process has failed\n" if $? || !$reply->{success};
        return 1;
    },
);
my $way = $ways{ $option{way} // '' } or die "--way is one of @{[ sort keys %ways ]}\n";

my $began = time;
my @clients;
for (1 .. $option{clients}) {
    pipe my $from, my $to or die "pipe: $!\n";
    my $pid = fork // die "fork: $!\n";
    if (!$pid) {
        close $from;
        run($to);
        exit;
    }
    close $to;
    push @clients, { pid => $pid, from => $from };
}

my ($calls, $errors, $load_cpu, $helper_cpu, $ended, @took) = (0, 0, 0, 0, $began);
for my $client (@clients) {
    my $told = do { local $/; readline $client->{from} };
    waitpid $client->{pid}, 0;
    my ($done, $failed, $own, $helpers, $last, @times) = unpack 'NNddd(d)*', $told;
    $calls      += $done;
    $errors     += $failed;
    $load_cpu   += $own;
    $helper_cpu += $helpers;
    $ended = $last if $last > $ended;
    push @took, @times;
}
@took = sort { $a <=> $b } @took;
my $seconds = $ended - $began;
printf '{"calls": %d, "errors": %d, "unanswered": 0, "seconds": %.6f, "calls_per_second": %.1f, '
    . '"p50_us": %.1f, "p99_us": %.1f, "p999_us": %.1f, "load_cpu_seconds": %.6f, '
    . qq("helper_cpu_seconds": %.6f}\n),
    $calls, $errors, $seconds, $seconds > 0 ? $calls / $seconds : 0,
    (map { percentile($_) } 0.5, 0.99, 0.999), $load_cpu, $helper_cpu;
exit($errors ? 1 : 0);

# A client's life, in its own process.
sub run {
    my ($to) = @_;
    my $bridge = CPANBridge->new(timeout => 60, $option{socket} ? (socket => $option{socket}) : ());
    my $until  = $began + $option{seconds};
    my ($done, $failed, @times) = (0, 0);
    my $last = time;
    while ($last < $until) {
        my $answered = eval { $way->($bridge) };
        my $now      = time;
        if ($answered) {
            $done += $answered;
            push @times, $now - $last;
        }
        else {
            warn $@ if !$failed++;
        }
        $last = $now;
    }
    my ($user, $system, $their_user, $their_system) = times;
    binmode $to;
    print {$to}
        pack('NNddd', $done, $failed, $user + $system, $their_user + $their_system, $last),
        pack('d*', @times);
    close $to;
    return;
}

# In microseconds.
sub percentile {
    my ($share) = @_;
    return 0 if !@took;
    my $rank = int($share * @took);
    return 1e6 * $took[ $rank < @took ? $rank : -1 ];
}
