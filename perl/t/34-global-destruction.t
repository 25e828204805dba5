use strict;
use warnings;

# Objects whose DESTROY runs in Perl's global destruction make calls, when Perl has taken away objects that variables
# refer to, patterns among them. What they send must be what they mean.

use B ();
use POSIX ();
use Test::More;

use lib 't/lib';
use CPANBridge;
use FakeDaemon;

my @params = (
    'a\u0041', 'x","y', "line\nend", 'plain', '12', '', "\xfc\x{20ac}", { "k\"\n" => 'v\\' },
    1.5, -7, 0.1 + 0.2, 18446744073709551615, undef, \1, \0,
);
my $reply = '[1.5,true,false,null,"\u0041\n\"","\\\\u0041",{"a\n":-0.0},0.30000000000000004,-7,[]]';

# What a process makes of them that has not encoded or decoded anything before it runs `change`.
sub made_after {
    my ($change) = @_;
    pipe my $from_child, my $to_parent or die $!;
    defined(my $pid = fork) or die $!;
    if (!$pid) {
        local $SIG{__WARN__} = sub { };
        $change->();
        my $made = join '', map {
            my $made = eval { $_->() };
            defined $made ? $made : ref $@ ? 'refused' : "died: $@";
        } sub { CPANBridge::JSON::encode(\@params) },
            sub { CPANBridge::JSON::encode({ refused => [ 9**9**9 ] }) },
            sub { CPANBridge::JSON::encode(CPANBridge::JSON::decode($reply)) },
            sub { CPANBridge::JSON::decode('[1,}') };
        syswrite $to_parent, $made;
        POSIX::_exit(0);
    }
    close $to_parent;
    my $made = do { local $/; <$from_child> };
    waitpid $pid, 0;
    return $made;
}

# The variables outside of the bridge's subs that these use: names, and references to them.
sub variables {
    my %variables;
    for my $package (map { "CPANBridge$_" } '', map { "::$_" }
        qw(Boolean Clock Connection Error Exchange JSON JSON::Decoder JSON::Encoder SocketPath))
    {
        no strict 'refs';
        for my $name (grep { !/::\z/ } keys %{"${package}::"}) {
            my $scalar = \${"${package}::$name"};
            $variables{"\$${package}::$name"} = $scalar if defined ${$scalar} && $name ne 'VERSION';
            next if !defined &{"${package}::$name"};
            my $code = B::svref_2object(\&{"${package}::$name"});
            next if $code->XSUB || $code->STASH->isa('B::SPECIAL') || $code->STASH->NAME ne $package;
            my ($names, $values) = map { [ $_->ARRAY ] } ($code->PADLIST->ARRAY)[ 0, 1 ];
            for my $index (grep { $names->[$_]->can('FLAGS') } 1 .. $#{$names}) {
                my ($outer, $our)
                    = defined &B::PADNAMEt_OUTER
                    ? (B::PADNAMEt_OUTER(), B::PADNAMEt_OUR())
                    : (B::SVf_FAKE(), B::SVpad_OUR());
                my $is_outer = ($names->[$index]->FLAGS & ($outer | $our)) == $outer;
                my $variable = $names->[$index]->PV;
                next if !$is_outer || !defined $variable || $variable !~ /\A[\$\@%]\w/;
                $variables{"$variable of ${package}::$name"} = $values->[$index]->object_2svref;
            }
        }
    }
    return %variables;
}

sub take {
    my ($variable) = @_;
    undef ${$variable} if ref $variable eq 'SCALAR' || ref $variable eq 'REF';
    @{$variable} = () if ref $variable eq 'ARRAY';
    %{$variable} = () if ref $variable eq 'HASH';
    return;
}

subtest 'what encodes and decodes depends on no variable' => sub {
    my %variables = variables();
    my $expected = made_after(sub { });
    like($expected, qr/\A\["a\\\\u0041","x\\",\\"y",.*,true,false\]refused\[1\.5,true,.*\]refused\z/s, 'as it should be');
    is(made_after(sub { take($variables{$_}) }), $expected, "without $_") for sort keys %variables;
    is(made_after(sub { take($_) for values %variables }), $expected, 'without any');
};

my $script = <<'END';
use strict;
use warnings;

BEGIN {
    package Last;
    sub new { my ($class, @options) = @_; return $class->SUPER::new(@options) }
    sub DESTROY {
        my ($self) = @_;
        my $result = $self->call_python('m', 'f', [
            'a\u0041', 'x","y', "line\nend", { "k\"\n" => 'v\\' }, 1.5, -7, 0.1 + 0.2, \1,
        ]);
        $self->call_python('m', 'g', $result);
    }
    our $early = bless {}, 'Last';
}
use CPANBridge;

our @ISA;
BEGIN { @Last::ISA = ('CPANBridge') }

my ($path, $is_used) = @ARGV;
%{$Last::early} = %{ CPANBridge->new(socket => $path) };
our $global = Last->new(socket => $path);
my $lexical = Last->new(socket => $path);
sub lexical { return $lexical }
our @array = map { Last->new(socket => $path) } 1 .. 3;
our %hash = (a => Last->new(socket => $path));
$global->call_python('m', 'before', ["x\n", 1.5]) if $is_used;
our $leaked = Last->new(socket => $path);
Internals::SvREFCNT(%{$leaked}, 2);
{ my $cycle = Last->new(socket => $path); $cycle->{itself} = $cycle }
END

for my $is_used (0, 1) {
    subtest 'a script whose objects call at its end, ' . ($is_used ? 'and before' : 'and never before') => sub {
        my $daemon = FakeDaemon->start(
            sub {
                my ($connection) = @_;
                local $SIG{CHLD} = 'IGNORE';
                return if fork;
                eval {
                    while (1) {
                        my $request = $connection->read_request;
                        $connection->note(CPANBridge::JSON::encode($request->{params}));
                        my $body = qq({"success":true,"request_id":"$request->{request_id}","result":$reply});
                        $connection->send_bytes($connection->frame($body));
                    }
                };
                POSIX::_exit(0);
            }
        );
        my $folder = File::Temp->newdir;
        open my $file, '>', "$folder/script" or die $!;
        print {$file} $script;
        close $file;
        system "$^X -Ilib $folder/script '$daemon->{path}' $is_used >$folder/output 2>&1";
        open my $output, '<', "$folder/output" or die $!;
        is(join('', <$output>), '', 'there are no complaints');
        my @calls = (
            'request f', '["a\\\\u0041","x\\",\\"y","line\nend",{"k\"\n":"v\\\\"},1.5,-7,0.30000000000000004,true]',
            'request g', CPANBridge::JSON::encode(CPANBridge::JSON::decode($reply)),
        ) x 9;
        my @noted = $daemon->noted;
        splice @noted, 0, 2 if $is_used;
        is_deeply(\@noted, \@calls, 'what arrives is what was meant');
    };
}

done_testing;
